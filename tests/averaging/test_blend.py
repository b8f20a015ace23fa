"""Blends of the last weights and an average, and the weights they are limited to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_models import adapted, bert, logits, relative, train, updates
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import flat, moved
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import LlamaConfig, LlamaForCausalLM

import swaft
from swaft import Readout
from swaft.averaging import lora, save_pretrained
from swaft.averaging.rules import LAWA
from swaft.averaging.shards import outside
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def plain():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, moved(model)


@given(blend=st.floats(-1, 2))
def test_a_blend_is_the_float64_one_to_the_rounding_of_its_terms(plain, blend):
    model, averager = plain
    last, average = flat(model), averager.shard().clone()
    with averager.swapped_in(blend=blend):
        found = flat(model)
    exact = last.double() + blend * (average.double() - last.double())
    assert ((found - exact).abs() <= 2.0**-23 * (last.abs() + 2 * (average - last).abs())).all()
    assert torch.equal(flat(model), last)
    assert torch.equal(averager.shard(), average)


def test_at_0_and_1_every_bit_is_that_of_the_last_weights_and_of_the_average(tmp_path):
    model = nn.Sequential(spectral_norm(nn.Linear(5, 7)), nn.BatchNorm1d(7))
    averager = moved(model)
    averager.wait()
    nn.init.constant_(model[1].bias, -0.0)  # has a sign to keep
    rows = torch.randn(4, 5)
    model.eval()
    last = model(rows)
    with averager.swapped_in():
        average = model(rows)
    for blend, expected in ((0, last), (1, average)):
        with averager.swapped_in(blend=blend):
            assert torch.equal(model(rows), expected)
    shards = averager.shard(Readout(blend=0)), averager.engine.live_shard()
    assert torch.equal(*(shard.view(torch.int32) for shard in shards))
    save_pretrained(averager.engine, tmp_path / "last")
    averager.save_pretrained(tmp_path / "blend 0", blend=0.0)
    averager.save_pretrained(tmp_path / "average")
    averager.save_pretrained(tmp_path / "blend 1", blend=1.0)
    for one, other in (("last", "blend 0"), ("average", "blend 1")):
        files = ((tmp_path / name / "model.safetensors").read_bytes() for name in (one, other))
        assert len({*files}) == 1
        cards = ((tmp_path / name / "README.md").read_text() for name in (one, other))
        assert len({card.split("holds ")[1] for card in cards}) == 1


def test_the_card_of_an_average_says_in_words_what_it_holds(plain, tmp_path):
    _, averager = plain
    averager.save_pretrained(tmp_path / "out", blend=0.5, note=" (for a test)")
    assert (
        "holds weights of a training run, averaged by `SWA(start=0, every=1, include_start=True)`: the 3 weights "
        "from step 0 to 2, 0.5 of the way from the last ones (for a test), in float32, written by swaft."
    ) in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("blend", [-1.01, 2.5, math.nan, math.inf, True, "0.3"])
def test_a_blend_out_of_range_is_refused_before_anything_is_swapped(plain, blend):
    _, averager = plain
    with (
        pytest.raises(AveragingError, match="expected a number, at least -1 and at most 2"),
        averager.swapped_in(blend=blend),
    ):
        pass
    assert not averager.engine.swap.active


@pytest.mark.parametrize("blend", [1.0, 0.4])
@pytest.mark.parametrize(
    ("scope", "stays"),
    [
        ("no_embeddings", lambda name: "embeddings." in name and "Norm" not in name),
        ("no_head", lambda name: "classifier" in name),
    ],
)
def test_what_a_scope_leaves_out_stays_as_it_was_last(scope, stays, blend, tmp_path):
    model = bert()
    averager = moved(model)
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = averager.shard().clone()
    with averager.swapped_in(Readout(blend=blend)):
        everywhere = {name: p.detach().clone() for name, p in model.named_parameters()}
    averager.save_pretrained(tmp_path / "out", Readout(blend=blend, scope=scope))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(map(stays, last)) > 1
    for name, tensor in last.items():
        assert torch.equal(saved[name], tensor if stays(name) else everywhere[name]), name
    assert torch.equal(averager.shard(), average)


def test_a_scope_that_the_model_has_no_parts_for_is_refused(plain):
    _, averager = plain
    for scope, message in (
        ("no_head", "Sequential, which does not say what its head is"),
        ("no_embeddings", "would leave 0 of the 4 trained parameters"),
        ("encoder", "expected one of all, no_embeddings, no_head"),
    ):
        with pytest.raises(AveragingError, match=message):
            averager.shard(Readout(scope=scope))


def test_a_scope_that_leaves_out_all_that_is_trained_is_refused():
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.raises(AveragingError, match="would leave 2 of the 2 trained parameters"):
        moved(model).shard(Readout(scope="no_head"))


def test_the_head_of_a_model_with_adapters_is_that_of_the_model_inside():
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    adapters = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    averager = moved(get_peft_model(LlamaForCausalLM(config), adapters))
    (head,) = outside(averager.engine, "no_head")
    assert "lm_head" in head


@pytest.mark.parametrize("blend", [-0.5, 0.3, 1.5])
def test_the_exact_mean_of_lora_updates_blends_exactly_with_the_last_update(blend):
    model = adapted()
    averager, recorded = train(model, rule=LAWA(last=3))
    assert (averager.num_averaged, averager.count()) == (3, 7)
    last, *members = (updates(model, weights) for weights in (recorded[-1], *recorded[-3:]))
    expected = {
        name: (1 - blend) * last[name] + blend * sum(each[name] for each in members) / 3 for name in last
    }
    product = lora.product_mean(averager, Readout(blend=blend), rank=8)
    assert product.num_members == 3
    found = {
        layer.name: layer.scaling
        * product.factors[layer.name][0].double()
        @ product.factors[layer.name][1].double()
        for layer in product._layers
    }
    assert max(relative(found, expected).values()) < 1e-6


def test_weights_of_an_adapter_are_blended_as_weights():
    model = adapted()
    averager, _ = train(model, rule=swaft.SWA(start=0))
    before = logits(model)
    with averager.swapped_in(blend=0):
        assert torch.equal(logits(model), before)
    with averager.swapped_in(blend=0.5):
        assert not torch.equal(logits(model), before)
