"""Every configuration file that comes with swaft loads, has its own run folder, and shows its launch line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from swaft.averaging.rules import RECOMMENDED
from swaft.noise import TaskLoss
from swaft.training.config import TrainConfig, build_rule, load_config
from swaft.training.data.causal_lm import CausalConfig
from swaft.training.data.classification import ClassificationConfig
from swaft.training.data.question_answering import QuestionAnsweringConfig
from swaft.training.data.seq2seq import Seq2SeqConfig
from swaft.training.launch.deepspeed_config import fill_auto, recipe_values
from swaft.training.models.build import build_objective

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "recipes/configs/classification").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
TASKS = {"mrpc", "rte", "cola", "sst2", "stsb", "banking77", "trec", "cr", "subj", "mpqa", "quickstart"}
OF_THE_HUB = {"xnli"}
EVERY_FAMILY = sorted((ROOT / "recipes/configs").rglob("*.yaml"))
FAMILIES = {
    "classification": ClassificationConfig,
    "question_answering": QuestionAnsweringConfig,
    "seq2seq": Seq2SeqConfig,
    "causal_lm": CausalConfig,
}
SWITCHES = (
    *(
        "noise.kind=none",
        "noise.kind=rdrop",
        "averaging.rule=none",
        "averaging.rule=swa",
        "averaging.rule=windows",
    ),
    "model.use_peft=false",
)


def test_there_is_a_config_for_every_task():
    assert {path.stem for path in CONFIGS} == TASKS | OF_THE_HUB


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    config = load_config(ClassificationConfig, ["--config", str(path)])
    assert config.train.output_dir == f"runs/{path.stem}"
    assert build_rule(config.averaging) == RECOMMENDED
    if path.stem in TASKS:
        assert config.model.model_name_or_path == "demo"
        assert config.data.task_name == ("python_docstrings" if path.stem == "quickstart" else path.stem)


@pytest.mark.parametrize("path", EVERY_FAMILY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_shipped_config_has_a_noise_without_effect(path):
    noise = yaml.safe_load(path.read_text(encoding="utf-8")).get("noise", {})
    if noise.get("kind") in ("r3f", "r4f"):
        assert noise.get("masks") == "independent" or (
            noise["preset"] == "relative" and noise.get("sigma", 1.0) >= 0.3
        )


def test_xnli_is_trained_on_english_and_evaluated_on_the_fifteen_languages_of_the_paper():
    path = next(path for path in CONFIGS if path.stem == "xnli")
    data = load_config(ClassificationConfig, ["--config", str(path)]).data
    assert (data.dataset_name, data.dataset_config_name) == ("facebook/xnli", "en")
    assert len({"en", *(data.eval_languages or "").split(",")}) == 15


@pytest.mark.parametrize("path", EVERY_FAMILY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_config_takes_every_switch_and_what_its_header_recommends(path):
    [line] = re.findall(
        "^# Override as section.name=value: (.*)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    recommended = line.split(". ")[0].rstrip(".").split(", ")
    assert all("=" in override for override in recommended)
    for override in dict.fromkeys([*SWITCHES, *recommended]):
        config = load_config(FAMILIES[path.parent.name], ["--config", str(path), override])
        assert (build_rule(config.averaging) is None) == (override == "averaging.rule=none")
        objective = build_objective(config.noise, seed=0)
        assert isinstance(objective, TaskLoss) == (config.noise.kind == "none")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_shows_its_launch_line(path):
    line = f"#   accelerate launch recipes/classification.py --config {path.relative_to(ROOT)}"
    assert line in path.read_text(encoding="utf-8").splitlines()


def test_there_is_a_deepspeed_file_for_every_stage_and_offload():
    stems = {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_offload_param"}
    assert {path.stem for path in DEEPSPEED} == stems
    readme = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.json`", readme, re.MULTILINE)) == stems


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_shipped_deepspeed_file_is_filled_and_deepspeed_takes_it(path, precision, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    train = TrainConfig(
        output_dir="-", per_device_train_batch_size=8, gradient_accumulation_steps=4, max_grad_norm=0.5
    )
    wanted = recipe_values(train, precision=precision, world_size=1, hidden_size=64)
    filled = fill_auto(json.loads(path.read_text()), wanted, source=path.name)
    assert filled.problems == []
    taken = runtime.DeepSpeedConfig(filled.config)
    assert (taken.train_batch_size, taken.train_micro_batch_size_per_gpu) == (32, 8)
    assert (taken.gradient_accumulation_steps, taken.gradient_clipping) == (4, 0.5)
    assert (taken.bfloat16_config.enabled, taken.float16_config.enabled) == (
        precision == "bf16",
        precision == "fp16",
    )
    zero = taken.zero_config
    assert path.stem.startswith(f"zero{int(zero.stage)}")
    assert (zero.offload_optimizer is not None) == ("offload" in path.stem)
    assert (zero.offload_param is not None) == path.stem.endswith("offload_param")
    assert zero.gather_16bit_weights_on_model_save == (zero.stage == 3)  # else get_state_dict fails
