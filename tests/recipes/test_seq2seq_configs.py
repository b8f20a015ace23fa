"""Every configuration of the recipe loads, describes a model there is, and shows its launch line."""

from __future__ import annotations

from pathlib import Path

import pytest

from swaft.training.config import build_rule, load_config
from swaft.training.data.seq2seq import Seq2SeqConfig
from swaft.training.evaluation.generation import get_generation_metric
from swaft.training.models.build import build_objective
from swaft.training.models.encoder_decoder import encoder_decoder_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes/configs/seq2seq").glob("*.yaml"))
LOCAL = {"smoke", "e2e", "scitldr", "tatoeba_en_fr"}


def test_there_is_a_config_for_every_task():
    assert {path.stem for path in CONFIGS} == LOCAL | {"cnn_dailymail", "xsum", "gigaword", "reddit_tifu"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads(path):
    config = load_config(Seq2SeqConfig, ["--config", str(path)])
    assert config.train.output_dir == f"runs/{'seq2seq-smoke' if path.stem == 'smoke' else path.stem}"
    assert build_rule(config.averaging) is not None
    build_objective(config.noise, seed=0, label_smoothing=config.train.label_smoothing_factor)
    get_generation_metric(config.eval.metric)
    if path.stem in LOCAL:
        assert encoder_decoder_config(config.model).model_type == "t5"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_shows_its_launch_line(path):
    line = f"#   accelerate launch recipes/seq2seq.py --config {path.relative_to(ROOT)}"
    assert line in path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_new_model_can_be_exchanged_for_a_pretrained_one(name):
    path = str(ROOT / f"recipes/configs/seq2seq/{name}.yaml")
    overrides = ["model.config=null", "model.vocab_size=null", "model.model_name_or_path=google-t5/t5-small"]
    assert load_config(Seq2SeqConfig, ["--config", path, *overrides]).model.config is None
