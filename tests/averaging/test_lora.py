"""The exact mean of LoRA updates against the dense one."""

from __future__ import annotations

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
    overall,
    relative,
    train,
    updates,
    written_config,
)
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import swaft
from swaft.averaging import lora
from swaft.averaging.rules import LAWA
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit


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


def test_a_rule_is_chosen_by_its_name_and_refused_if_it_keeps_no_members():
    model = adapted()
    averager, _ = train(model, rule={"swa": swaft.SWA(start=0), "lawa": LAWA(last=2)})
    assert lora.product_mean(averager, "lawa").num_members == 2
    with pytest.raises(AveragingError, match=r"average 'swa' is made of running means.*LAWA\(last=4\)"):
        lora.product_mean(averager, "swa")


def test_nothing_averaged_yet_is_refused():
    averager, _ = train(adapted(), rule=LAWA(last=2, start=6), steps=7)
    early = swaft.WeightAverager(
        averager.engine.module, averager.engine.inner_optimizer, rule=LAWA(last=2, start=5), total_steps=9
    )
    with pytest.raises(AveragingError, match="nothing is averaged yet"):
        lora.product_mean(early)


def test_an_average_that_never_moved_is_refused(tmp_path):
    averager, _ = train(adapted(), moving=lambda name: False)
    for use in (lora.product_mean, lambda averager: lora.save_merged(averager, tmp_path / "merged")):
        with pytest.raises(AveragingError, match="all were the same bit for bit"):
            use(averager)
    assert not (tmp_path / "merged").exists()


def test_a_scope_is_refused():
    averager, _ = train(adapted())
    with pytest.raises(AveragingError, match="scope is 'no_head'; expected 'all'"):
        lora.product_mean(averager, swaft.Readout(scope="no_head"))


def test_torchs_default_device_is_not_where_factors_are_computed():
    averager, _ = train(adapted())
    expected = lora.product_mean(averager, rank=4).factors
    try:
        torch.set_default_device("meta")
        found = lora.product_mean(averager, rank=4).factors
    finally:
        torch.set_default_device(None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))


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
        (
            lambda: get_peft_model(bert(), PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")),
            "no LoRA factor is trained",
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
