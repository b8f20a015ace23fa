"""The mean of LoRA updates against means that are taken densely, in float64, by peft's own account of an update."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import swaft
from swaft.averaging import lora
from swaft.averaging.rules import LAWA
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.Unflatten(1, (2, 4)), nn.Conv2d(2, 6, (2, 3)))


MODELS = {
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "rslora": (bert, {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "value"],
            "rank_pattern": {"layer.0.attention.self.query": 3},
            "alpha_pattern": {"value": 32, "layer.1.attention.self.query": 1},
        },
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "convolutions": (convolutions, {"target_modules": ["0", "2"]}),
}


def adapted(kind="bert", *, rank=2, **changes):
    make, options = MODELS[kind]
    torch.manual_seed(1)
    return get_peft_model(make(), LoraConfig(r=rank, **{**options, **changes}))


def train(model, *, rule=None, steps=6, moving=lambda name: True):
    """Random steps; returns the averager and the parameters after every step, the first before them all."""
    torch.manual_seed(2)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.3)
    averager = swaft.WeightAverager(model, optimizer, rule=rule or LAWA(last=4), total_steps=steps)
    recorded = [{name: p.detach().clone() for name, p in trainable.items()}]
    for _ in range(steps):
        for name, parameter in trainable.items():
            parameter.grad = torch.randn_like(parameter) if moving(name) else torch.zeros_like(parameter)
        optimizer.step()
        averager.step()
        recorded.append({name: p.detach().clone() for name, p in trainable.items()})
    return averager, recorded


@torch.no_grad()
def updates(model, weights=None):
    """Every dense update, in float64, as peft computes it, once `weights` are in the model."""
    exact = copy.deepcopy(model).double()
    parameters = dict(exact.named_parameters())
    for name, tensor in (weights or {}).items():
        parameters[name].copy_(tensor)
    return {
        f"{name.removeprefix('base_model.model.')}:{adapter}": layer.get_delta_weight(adapter)
        for name, layer in exact.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.r
    }


def mean(dicts):
    return {name: sum(each[name] for each in dicts) / len(dicts) for name in dicts[0]}


def mean_update(model, recorded):
    return mean([updates(model, weights) for weights in recorded])


def mean_factors(recorded):
    return mean([{name: tensor.double() for name, tensor in weights.items()} for weights in recorded])


def relative(found, expected):
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


def overall(found, expected):
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(each.square().sum()) for each in expected.values())) ** 0.5


def loaded(kind, folder):
    return PeftModel.from_pretrained(MODELS[kind][0](), folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def one_ulp_apart(found, expected):
    """Whether fp32 weights are the float64 ones rounded, or their neighbours."""
    rounded = expected.float()
    below, above = (torch.nextafter(rounded, torch.tensor(way)) for way in (-torch.inf, torch.inf))
    return bool(((found >= below) & (found <= above)).all())


def written_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("kind", MODELS)
def test_at_full_rank_the_new_factors_hold_the_dense_mean_of_the_updates(kind, tmp_path):
    model = adapted(kind)
    averager, recorded = train(model)
    expected = mean_update(model, recorded[-4:])
    product = lora.product_mean(averager, rank=12)
    assert product.truncation.overall < 1e-12
    product.save_adapter(tmp_path / "out")
    found = updates(loaded(kind, tmp_path / "out"))
    assert found.keys() == expected.keys() == product.factors.keys()
    assert max(relative(found, expected).values()) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_at_a_lower_rank_no_factors_come_closer_and_the_loss_is_told(kind, tmp_path):
    model = adapted(kind)
    averager, recorded = train(model)
    expected = mean_update(model, recorded[-4:])
    product = lora.product_mean(averager, rank=1)
    product.save_adapter(tmp_path / "out")
    lost = relative(updates(loaded(kind, tmp_path / "out")), expected)
    for name, update in expected.items():
        values = torch.linalg.svdvals(update.flatten(1))
        assert lost[name] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-5)
    assert product.truncation.by_layer == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gap_is_what_the_dense_mean_of_the_factors_is_off_by(kind):
    model = adapted(kind)
    averager, recorded = train(model)
    expected = mean_update(model, recorded[-4:])
    cheap = updates(model, mean_factors(recorded[-4:]))
    gap = lora.product_mean(averager).gap
    assert gap.by_layer == pytest.approx(relative(cheap, expected), rel=1e-9)
    assert gap.overall == pytest.approx(overall(cheap, expected), rel=1e-9)
    assert min(gap.by_layer.values()) > 0.01


@pytest.mark.parametrize("still", ["lora_A", "lora_B"])
def test_there_is_no_gap_where_one_factor_alone_moves(still):
    model = adapted(init_lora_weights=False)
    averager, _ = train(model, rule=LAWA(last=3), moving=lambda name: still not in name)
    product = lora.product_mean(averager)
    assert product.gap.overall == 0.0
    assert set(product.gap.by_layer.values()) == {0.0}


def test_updates_that_are_all_nothing_have_no_gap_and_lose_nothing():
    averager, _ = train(adapted(), moving=lambda name: "lora_B" not in name)
    product = lora.product_mean(averager)
    assert product.gap.overall == product.truncation.overall == 0.0


@pytest.mark.parametrize("freeze", ["lora_A", "lora_B", "by MiCA"])
def test_a_layer_that_trains_one_factor_keeps_the_other(freeze, tmp_path):
    model = adapted(init_lora_weights="mica" if freeze == "by MiCA" else False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and freeze not in name)
    averager, recorded = train(model, rule=LAWA(last=3))
    product = lora.product_mean(averager)
    assert product.gap.overall == product.truncation.overall == 0.0
    with product.swapped_in():
        assert max(relative(updates(model), mean_update(model, recorded[-3:])).values()) < 1e-6
    product.save_adapter(tmp_path / "out")
    found = updates(loaded("bert", tmp_path / "out"))
    assert max(relative(found, mean_update(model, recorded[-3:])).values()) < 1e-6
    half = lora.product_mean(averager, rank=1)
    half.save_adapter(tmp_path / "half")
    found = updates(loaded("bert", tmp_path / "half"))
    assert relative(found, mean_update(model, recorded[-3:])) == pytest.approx(
        half.truncation.by_layer, rel=1e-5
    )
    assert half.truncation.overall > 0.01
    with pytest.raises(AveragingError, match="without `rank`"), half.swapped_in():
        pass


def test_a_frozen_layer_of_a_trained_adapter_keeps_its_update_at_another_rank(tmp_path):
    model = adapted(init_lora_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "layer.0" not in name)
    averager, recorded = train(model)
    lora.product_mean(averager, rank=8).save_adapter(tmp_path / "out")
    found = updates(loaded("bert", tmp_path / "out"))
    assert max(relative(found, mean_update(model, recorded[-4:])).values()) < 1e-6


def test_the_swap_shows_the_new_factors_and_gives_back_the_live_ones(tmp_path):
    model = adapted(modules_to_save=["classifier"])
    averager, recorded = train(model)
    product = lora.product_mean(averager)
    before = logits(model)
    with product.swapped_in():
        inside = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        seen = logits(model)
    assert torch.equal(logits(model), before)
    product.save_adapter(tmp_path / "out")
    assert torch.equal(seen, logits(loaded("bert", tmp_path / "out")))
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.allclose(inside[head].double(), mean_factors(recorded[-4:])[head], rtol=1e-6)
    for layer, (up, down) in product.factors.items():
        path = f"base_model.model.{layer.removesuffix(':default')}"
        assert torch.equal(inside[f"{path}.lora_B.default.weight"], up)
        assert torch.equal(inside[f"{path}.lora_A.default.weight"], down)


def test_a_swap_of_another_rank_is_refused():
    averager, _ = train(adapted())
    product = lora.product_mean(averager, rank=3)
    with pytest.raises(AveragingError, match=r"rank 3.*'default'.*without `rank`"), product.swapped_in():
        pass


def test_new_factors_are_balanced():
    averager, _ = train(adapted())
    for up, down in lora.product_mean(averager).factors.values():
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-5)


def test_the_configured_rank_leaves_the_configuration_alone(tmp_path):
    averager, _ = train(adapted("patterns"))
    averager.save_pretrained(tmp_path / "factors")
    lora.product_mean(averager).save_adapter(tmp_path / "product")
    assert written_config(tmp_path / "product") == written_config(tmp_path / "factors")


def test_another_rank_is_written_with_an_alpha_that_keeps_every_scaling(tmp_path):
    model = adapted("patterns", use_rslora=True, init_lora_weights="orthogonal", rank_pattern={}, rank=4)
    averager, _ = train(model)
    lora.product_mean(averager, rank=7).save_adapter(tmp_path / "out")
    again = loaded("patterns", tmp_path / "out")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            assert again.get_submodule(name).r == {"default": 7}
            assert again.get_submodule(name).scaling["default"] == pytest.approx(
                layer.scaling["default"], rel=1e-12
            )


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


def opened(kind, folder):
    """The weights of a merged model, after what opens such a folder has opened it."""
    if kind == "convolutions":
        return load_file(folder / "model.safetensors")
    opens = AutoModelForCausalLM if kind == "gpt2" else AutoModelForSequenceClassification
    model, report = opens.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    return model.state_dict()


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
    lora.save_merged(averager, tmp_path / "out")
    with averager.swapped_in():
        expected = logits(model)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)


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
    lora.save_merged(averager, tmp_path / "out")
    with averager.swapped_in():
        expected = logits(model)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)


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


def test_a_rule_is_chosen_by_its_name():
    model = adapted()
    averager, _ = train(model, rule={"swa": swaft.SWA(start=0), "lawa": LAWA(last=2)})
    assert lora.product_mean(averager, "lawa").num_members == 2
    with pytest.raises(AveragingError, match=r"SWAPlan is made of running means.*LAWA"):
        lora.product_mean(averager, "swa")


@pytest.mark.parametrize("rule", [swaft.SWA(start=0), swaft.EMA(decay=0.9)])
def test_a_rule_that_keeps_no_members_is_refused(rule):
    averager, _ = train(adapted(), rule=rule)
    with pytest.raises(AveragingError, match=r"running means.*LAWA\(last=4\)"):
        lora.product_mean(averager)


def test_nothing_averaged_yet_is_refused():
    averager, _ = train(adapted(), rule=LAWA(last=2, start=6), steps=7)
    early = swaft.WeightAverager(
        averager.engine.module, averager.engine.inner_optimizer, rule=LAWA(last=2, start=5), total_steps=9
    )
    with pytest.raises(AveragingError, match="nothing is averaged yet"):
        lora.product_mean(early)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_that_is_none_is_refused(rank):
    averager, _ = train(adapted())
    with pytest.raises(AveragingError, match="expected a whole number of at least 1"):
        lora.product_mean(averager, rank=rank)


class Experts(nn.Module):
    """Two experts in one parameter, as mixtures of experts keep them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        return x @ self.weight[0]


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            lambda: get_peft_model(bert(), LoraConfig(target_modules=["query"], use_dora=True)),
            "DoraLinearVariant",
        ),
        (
            lambda: get_peft_model(
                nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"])
            ),
            "convolution in 2 groups",
        ),
        (
            lambda: get_peft_model(
                nn.Sequential(nn.MultiheadAttention(4, 2)), LoraConfig(r=2, target_modules=["0"])
            ),
            "MultiheadAttention",
        ),
        (
            lambda: get_peft_model(
                Mixture(), LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
            ),
            "ParamWrapper",
        ),
        (
            lambda: get_peft_model(bert(), IA3Config(target_modules=["query"], feedforward_modules=[])),
            "peft.tuners.ia3",
        ),
        (bert, "expected a PeftModel"),
    ],
)
def test_a_model_whose_update_is_no_product_is_refused_with_the_layer(model, named, tmp_path):
    averager, _ = train(model())
    with pytest.raises(AveragingError, match=named):
        lora.product_mean(averager)
    with pytest.raises(AveragingError, match=named):
        lora.save_merged(averager, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_trains_no_factor_is_refused():
    model = adapted(modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    averager, _ = train(model)
    with pytest.raises(AveragingError, match="no LoRA factor is trained"):
        lora.product_mean(averager)


def test_adapters_merged_into_the_live_weights_are_refused():
    model = adapted()
    averager, _ = train(model)
    model.merge_adapter()
    with pytest.raises(AveragingError, match="merged into its weight"):
        lora.product_mean(averager)


def test_an_adapter_that_changes_its_base_keeps_its_rank(tmp_path):
    averager, _ = train(adapted(init_lora_weights="pissa"))
    lora.product_mean(averager).save_adapter(tmp_path / "same")
    with pytest.raises(AveragingError, match=r"init_lora_weights='pissa'.*save_merged"):
        lora.product_mean(averager, rank=4).save_adapter(tmp_path / "other")


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


@pytest.mark.parametrize("save", ["save_adapter", "save_merged"])
def test_nothing_is_overwritten(save, tmp_path):
    averager, _ = train(adapted())
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(AveragingError, match="name another path"):
        getattr(lora.product_mean(averager), save)(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_the_report_names_the_worst_layer_and_both_distances():
    averager, _ = train(adapted("patterns"))
    product = lora.product_mean(averager)
    text = str(product)
    assert "mean of 4 LoRA updates in 4 layers, new factors of each layer's own rank" in text
    for distance in (product.gap, product.truncation):
        worst = max(distance.by_layer, key=distance.by_layer.get)
        assert f"{distance.overall:.2e} overall, at most {distance.by_layer[worst]:.2e} ({worst})" in text
