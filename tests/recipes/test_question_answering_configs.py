"""Every configuration of the recipe loads and shows its launch line."""

from __future__ import annotations

from pathlib import Path

import pytest

from swaft.training.config import build_rule, load_config
from swaft.training.data.question_answering import QuestionAnsweringConfig
from swaft.training.evaluation.answering import get_question_metric
from swaft.training.models.build import build_objective

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs/question_answering").glob("*.yaml"))


def test_there_is_a_config_for_every_task():
    assert {path.stem for path in CONFIGS} == {"smoke", "squad", "squad_reddit", "squad_v2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    config = load_config(QuestionAnsweringConfig, ["--config", str(path)])
    name = "question_answering-smoke" if path.stem == "smoke" else path.stem
    assert config.train.output_dir == f"runs/{name}"
    assert build_rule(config.averaging) is not None
    build_objective(config.noise, seed=0)
    told = config.data.version_2_with_negative
    metric = get_question_metric(config.eval.metric, has_unanswerable=bool(told))
    assert metric.name == ("squad_v2" if path.stem == "squad_v2" else "squad")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_shows_its_launch_line(path):
    line = f"#   accelerate launch recipes/question_answering.py --config {path.relative_to(ROOT)}"
    assert line in path.read_text(encoding="utf-8").splitlines()


def test_the_rows_of_a_local_config_can_be_exchanged():
    overrides = ["data.train_file=train.parquet", "data.validation_file=validation.parquet"]
    path = str(ROOT / "recipes/configs/question_answering/squad_reddit.yaml")
    config = load_config(QuestionAnsweringConfig, ["--config", path, *overrides])
    assert config.data.task_name is None
