"""Every configuration file that comes with swaft loads, has its own run folder, and shows its launch line."""

from __future__ import annotations

from pathlib import Path

import pytest

from swaft.config import ClassificationConfig, load_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs/classification").glob("*.yaml"))
TASKS = {"mrpc", "rte", "cola", "sst2", "stsb", "banking77", "trec", "cr", "subj", "mpqa", "quickstart"}


def test_there_is_a_config_for_every_task():
    assert {path.stem for path in CONFIGS} == TASKS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    config = load_config(ClassificationConfig, ["--config", str(path)])
    assert config.model.model_name_or_path == "demo"
    assert config.train.output_dir == f"runs/{path.stem}"
    assert (config.averaging.rule, config.averaging.start) == ("swa", 0.5)
    assert config.data.task_name == ("python_docstrings" if path.stem == "quickstart" else path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_can_be_switched_to_plain_fine_tuning(path):
    from swaft.noise import TaskLoss
    from swaft.training.build import build_objective

    config = load_config(
        ClassificationConfig, ["--config", str(path), "averaging.rule=none", "noise.kind=none"]
    )
    assert isinstance(build_objective(config.noise, seed=0), TaskLoss)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_shows_its_launch_line(path):
    line = f"#   accelerate launch recipes/classification.py --config {path.relative_to(ROOT)}"
    assert line in path.read_text(encoding="utf-8").splitlines()
