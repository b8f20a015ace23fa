from __future__ import annotations

import pytest
import torch
from tiny_training import make_classifier
from transformers import T5Config, T5ForConditionalGeneration

from swaft.errors import ConfigError
from swaft.noise import R3F, R4F, RDrop, TaskLoss
from swaft.training.config import NoiseConfig, TrainConfig
from swaft.training.models.build import build_objective, build_optimizer, count_parameters

pytestmark = pytest.mark.unit


def test_biases_and_other_vectors_are_not_decayed():
    model = make_classifier()
    model.embedding.weight.requires_grad_(False)
    optimizer = build_optimizer(model, TrainConfig(output_dir="unused", weight_decay=0.1, adam_beta2=0.98))
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.head.weight)]
    assert [id(p) for p in plain["params"]] == [id(model.head.bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def test_a_matrix_that_is_a_bias_by_its_name_is_not_decayed():
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**small))
    decayed, plain = build_optimizer(model, TrainConfig(output_dir="unused")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {
        f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for half in ("encoder", "decoder")
    }
    assert {names[id(p)] for p in plain["params"] if p.ndim == 2} == expected
    assert all(p.ndim == 2 for p in decayed["params"])


def test_a_matrix_that_zero3_has_emptied_is_decayed_and_counted_as_the_matrix_it_is():
    model = make_classifier()
    whole = count_parameters(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    decayed, plain = build_optimizer(model, TrainConfig(output_dir="unused")).param_groups
    assert (len(decayed["params"]), len(plain["params"])) == (2, 1)
    assert count_parameters(model) == whole == (11 * 3 + 3 * 2 + 2,) * 2


@pytest.mark.parametrize(
    ("kind", "objective"), [("none", TaskLoss), ("r3f", R3F), ("r4f", R4F), ("rdrop", RDrop)]
)
def test_each_kind_of_noise_has_its_objective(kind, objective):
    built = build_objective(NoiseConfig(kind=kind), seed=1)
    assert isinstance(built, objective)
    assert type(built).__name__ == objective.__name__


def test_a_kind_of_noise_that_there_is_not_is_not_taken_for_none():
    with pytest.raises(KeyError, match="smart"):
        build_objective(NoiseConfig(kind="smart"), seed=1)  # type: ignore[arg-type]


def test_options_that_are_set_win_over_the_preset():
    built = build_objective(NoiseConfig(kind="r3f", preset="relative", sigma=0.5, weight=2.0), seed=1)
    assert built.weight == 2.0
    assert built.settings_for(make_classifier()).sigma == 0.5
    assert built.settings_for(make_classifier()).relative


@pytest.mark.parametrize("kind", ["none", "rdrop"])
def test_an_option_that_would_be_ignored_is_an_error(kind):
    with pytest.raises(ConfigError, match=r"noise\.sigma: is 0\.1"):
        build_objective(NoiseConfig(kind=kind, sigma=0.1), seed=1)


@pytest.mark.parametrize("kind", ["r3f", "r4f", "rdrop"])
def test_how_the_passes_are_run_is_an_option_of_every_objective(kind):
    built = build_objective(NoiseConfig(kind=kind, passes="doubled", fused=False), seed=0)
    settings = built.settings_for(make_classifier())
    assert (settings.passes, settings.fused) == ("doubled", False)
    with pytest.raises(ConfigError, match=r"noise\.fused: is false, which noise\.kind=none does not use"):
        build_objective(NoiseConfig(fused=False), seed=0)


def test_an_option_of_r4f_alone_is_refused_by_r3f_and_taken_by_r4f():
    assert build_objective(NoiseConfig(kind="r4f", layers="last"), seed=0).layers == "last"
    with pytest.raises(ConfigError, match=r"noise\.layers: is last, which noise\.kind=r3f does not use"):
        build_objective(NoiseConfig(kind="r3f", layers="last"), seed=0)


@pytest.mark.parametrize("kind", ["none", "r3f", "rdrop"])
def test_label_smoothing_acts_with_every_kind_of_noise(kind):
    built = build_objective(NoiseConfig(kind=kind), seed=0, label_smoothing=0.1)
    if kind == "none":
        assert built.label_smoothing == 0.1
    else:
        assert built.settings_for(make_classifier()).label_smoothing == 0.1
