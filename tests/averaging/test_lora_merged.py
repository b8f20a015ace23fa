"""Base models with averaged LoRA updates in their weights."""

from __future__ import annotations

import json

import pytest
import torch
from lora_models import (
    MODELS,
    adapted,
    bert,
    loaded,
    logits,
    mean_factors,
    mean_update,
    relative,
    train,
    updates,
    written_config,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import swaft
from swaft.averaging import lora
from swaft.averaging.rules import LAWA
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit


def one_ulp_apart(found, expected):
    """Whether fp32 weights are the float64 ones rounded, or their neighbours."""
    rounded = expected.float()
    below, above = (torch.nextafter(rounded, torch.tensor(way)) for way in (-torch.inf, torch.inf))
    return bool(((found >= below) & (found <= above)).all())


def opened(kind, folder):
    """The weights of a merged model, after what opens such a folder has opened it."""
    if kind == "convolutions":
        return load_file(folder / "model.safetensors")
    opens = AutoModelForCausalLM if kind == "gpt2" else AutoModelForSequenceClassification
    model, report = opens.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    return model.state_dict()


def assert_merged_as_swapped_in(averager, model, folder):
    """The merged folder answers as the model does with the average swapped in."""
    lora.save_merged(averager, folder)
    with averager.swapped_in():
        expected = logits(model)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_is_the_base_plus_the_dense_mean_to_the_last_bit(kind, tmp_path):
    model = adapted(kind)
    averager, recorded = train(model)
    expected = mean_update(model, recorded[-4:])
    lora.product_mean(averager, rank=1).save_merged(tmp_path / "out")
    merged = opened(kind, tmp_path / "out")
    base = MODELS[kind][0]().state_dict()
    assert merged.keys() == base.keys()
    for name, head in mean_factors(recorded[-4:]).items():
        if "modules_to_save.default." in name:
            base[name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")] = head
    for name, weight in merged.items():
        update = expected.get(f"{name.removesuffix('.weight')}:default", torch.zeros(1))
        assert one_ulp_apart(weight, base[name].double() + update)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_model_answers_as_the_peft_model_that_holds_the_product(kind, tmp_path):
    averager, _ = train(adapted(kind))
    product = lora.product_mean(averager, rank=8)
    product.save_adapter(tmp_path / "adapter")
    product.save_merged(tmp_path / "merged")
    opens = AutoModelForCausalLM if kind == "gpt2" else AutoModelForSequenceClassification
    merged = opens.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(loaded(kind, tmp_path / "adapter")), rtol=1e-4, atol=1e-4)


def test_tied_weights_of_which_one_is_adapted_are_two_in_the_merged_model(tmp_path):
    averager, _ = train(adapted("gpt2"))
    lora.save_merged(averager, tmp_path / "wte")
    assert json.loads((tmp_path / "wte" / "config.json").read_text())["tie_word_embeddings"] is False
    averager, _ = train(adapted("gpt2", target_modules=["c_attn"]))
    lora.save_merged(averager, tmp_path / "attention")
    assert json.loads((tmp_path / "attention" / "config.json").read_text())["tie_word_embeddings"] is True


def test_all_that_is_trained_beside_the_factors_is_in_the_merged_model(tmp_path):
    model = adapted(
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        bias="lora_only",
        lora_bias=True,
        trainable_token_indices={"word_embeddings": [3, 1]},
    )
    averager, _ = train(model, rule=swaft.SWA(start=0))
    assert_merged_as_swapped_in(averager, model, tmp_path / "out")


def test_every_active_adapter_is_merged_and_every_trained_one_is_averaged(tmp_path):
    model = adapted(target_modules=["query"], init_lora_weights=False, task_type=None)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query", "value"]))
    model.add_adapter("idle", LoraConfig(r=1, target_modules=["key"], use_dora=True))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "second" in name)
    averager, recorded = train(model)
    product = lora.product_mean(averager, rank=12)
    expected = mean_update(model, recorded[-4:])
    assert product.factors.keys() == {name for name in expected if name.endswith(":second")}
    product.save_merged(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").state_dict()
    base = bert().state_dict()
    for name in ("query", "value", "key"):
        layer = f"bert.encoder.layer.1.attention.self.{name}"
        update = sum(expected.get(f"{layer}:{each}", torch.zeros(1)) for each in ("default", "second"))
        assert one_ulp_apart(merged[f"{layer}.weight"], base[f"{layer}.weight"].double() + update)
    product.save_adapter(tmp_path / "adapters")
    assert written_config(tmp_path / "adapters")["r"] == 2
    assert written_config(tmp_path / "adapters" / "second")["r"] == 12
    found = updates(
        PeftModel.from_pretrained(bert(), tmp_path / "adapters" / "second", adapter_name="second")
    )
    assert max(relative(found, {name: expected[name] for name in found}).values()) < 1e-6


def test_a_parametrized_head_is_merged_as_the_plain_weight_it_evaluates_to(tmp_path):
    base = bert()
    base.classifier = spectral_norm(base.classifier)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    averager, _ = train(model, rule=swaft.SWA(start=0))
    assert_merged_as_swapped_in(averager, model, tmp_path / "out")


def test_a_parts_wrapper_is_in_no_name(tmp_path):
    model = adapted()
    layers = model.base_model.model.bert.encoder.layer
    layers[0] = checkpoint_wrapper(layers[0])
    averager, recorded = train(model)
    product = lora.product_mean(averager, rank=8)
    product.save_adapter(tmp_path / "adapter")
    product.save_merged(tmp_path / "merged")
    expected = {
        name.replace("_checkpoint_wrapped_module.", ""): update
        for name, update in mean_update(model, recorded[-4:]).items()
    }
    assert max(relative(updates(loaded("bert", tmp_path / "adapter")), expected).values()) < 1e-6
    assert opened("bert", tmp_path / "merged").keys() == bert().state_dict().keys()


def test_the_mean_of_the_factors_can_be_merged_under_any_rule(tmp_path):
    model = adapted()
    averager, _ = train(model, rule={"ema": swaft.EMA(decay=0.8), "lawa": LAWA(last=2)})
    lora.save_merged(averager, tmp_path / "ema", "ema")
    with averager.swapped_in("ema"):
        expected = updates(model)
    merged, base = opened("bert", tmp_path / "ema"), bert().state_dict()
    for name, update in expected.items():
        weight = f"{name.removesuffix(':default')}.weight"
        assert one_ulp_apart(merged[weight], base[weight].double() + update)


def test_a_quantised_base_is_not_merged_into(tmp_path):
    model = adapted()
    averager, _ = train(model)
    model.get_base_model().hf_quantizer = object()
    with pytest.raises(AveragingError, match="quantised"):
        lora.product_mean(averager).save_merged(tmp_path / "out")


def test_a_bias_with_nowhere_to_go_is_not_merged(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    averager, _ = train(model)
    with pytest.raises(AveragingError, match="lora_bias=True"):
        lora.save_merged(averager, tmp_path / "out")
