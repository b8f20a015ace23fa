"""Every configuration file that comes with swaft loads, has its own run folder, and shows its launch line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from swaft.averaging.rules import RECOMMENDED
from swaft.noise import TaskLoss
from swaft.training.config import TrainConfig, build_rule, load_config
from swaft.training.data.causal_lm import CausalConfig
from swaft.training.data.classification import ClassificationConfig
from swaft.training.data.question_answering import QuestionAnsweringConfig
from swaft.training.data.seq2seq import Seq2SeqConfig
from swaft.training.evaluation.answering import get_question_metric
from swaft.training.evaluation.generation import get_generation_metric
from swaft.training.launch.deepspeed_config import fill_auto, recipe_values
from swaft.training.models.build import build_objective
from swaft.training.models.text_generation import encoder_decoder_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "recipes/configs").rglob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
TASKS = {"mrpc", "rte", "cola", "sst2", "stsb", "banking77", "trec", "cr", "subj", "mpqa", "quickstart"}
NEW_MODELS = {"smoke", "e2e", "scitldr", "tatoeba_en_fr"}
SHIPPED = {
    "classification": TASKS | {"xnli"},
    "question_answering": {"smoke", "squad", "squad_reddit", "squad_v2"},
    "seq2seq": NEW_MODELS | {"cnn_dailymail", "xsum", "gigaword", "reddit_tifu"},
    "causal_lm": {"smoke", "smol_chat"},
}
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


every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def loaded(path: Path, *overrides: str) -> Any:
    return load_config(FAMILIES[path.parent.name], ["--config", str(path), *overrides])


def shipped(family: str, name: str) -> Path:
    return ROOT / "recipes" / "configs" / family / f"{name}.yaml"


def test_there_is_a_config_for_every_task():
    assert {*CONFIGS} == {shipped(family, name) for family, names in SHIPPED.items() for name in names}


@every_config
def test_shipped_config_loads(path):
    config, family = loaded(path), path.parent.name
    assert config.train.output_dir == f"runs/{f'{family}-smoke' if path.stem == 'smoke' else path.stem}"
    assert build_rule(config.averaging) == RECOMMENDED
    if path.stem in TASKS:
        assert config.model.model_name_or_path == "demo"
        assert config.data.task_name == ("python_docstrings" if path.stem == "quickstart" else path.stem)
    if family == "question_answering":
        told = config.data.version_2_with_negative
        metric = get_question_metric(config.eval.metric, has_unanswerable=bool(told))
        assert metric.name == ("squad_v2" if path.stem == "squad_v2" else "squad")
    if family == "seq2seq":
        get_generation_metric(config.eval.metric)
        if path.stem in NEW_MODELS:
            assert encoder_decoder_config(config.model).model_type == "t5"


@pytest.mark.parametrize("name", sorted(NEW_MODELS))
def test_a_new_model_can_be_exchanged_for_a_pretrained_one(name):
    overrides = ["model.config=null", "model.vocab_size=null", "model.model_name_or_path=google-t5/t5-small"]
    assert loaded(shipped("seq2seq", name), *overrides).model.config is None


def test_the_rows_of_a_local_config_can_be_exchanged():
    overrides = ["data.train_file=train.parquet", "data.validation_file=validation.parquet"]
    assert loaded(shipped("question_answering", "squad_reddit"), *overrides).data.task_name is None


@every_config
def test_no_shipped_config_has_a_noise_without_effect(path):
    noise = yaml.safe_load(path.read_text(encoding="utf-8")).get("noise", {})
    if noise.get("kind") in ("r3f", "r4f"):
        assert noise.get("masks") == "independent" or (
            noise["preset"] == "relative" and noise.get("sigma", 1.0) >= 0.3
        )


def test_xnli_is_trained_on_english_and_evaluated_on_the_fifteen_languages_of_the_paper():
    data = loaded(shipped("classification", "xnli")).data
    assert (data.dataset_name, data.dataset_config_name) == ("facebook/xnli", "en")
    assert len({"en", *(data.eval_languages or "").split(",")}) == 15


@every_config
def test_shipped_config_takes_every_switch_and_what_its_header_recommends(path):
    [line] = re.findall(
        "^# Override as section.name=value: (.*)", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    recommended = line.split(". ")[0].rstrip(".").split(", ")
    assert all("=" in override for override in recommended)
    for override in dict.fromkeys([*SWITCHES, *recommended]):
        config = loaded(path, override)
        assert (build_rule(config.averaging) is None) == (override == "averaging.rule=none")
        objective = build_objective(config.noise, seed=0)
        assert isinstance(objective, TaskLoss) == (config.noise.kind == "none")


@every_config
def test_shipped_config_shows_its_launch_line(path):
    words = rf"recipes/{path.parent.name}\.py --config {path.relative_to(ROOT)}"
    text = path.read_text(encoding="utf-8").replace("\\\n#       ", "")  # the line may go on in the next one
    assert re.search(rf"^#   accelerate launch (--config_file \S+ )?{words}$", text, re.MULTILINE)


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
