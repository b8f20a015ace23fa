"""What a model holds beside its weights goes with the averaged weights: derived from them, or computed for them."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import update_bn

import swaft
from swaft.errors import AveragingError
from swaft.noise.spectral import SpectralNorm

pytestmark = pytest.mark.unit


averaged = partial(small_runs.averaged, steps=40, lr=0.1)
"""An averager of a model that has moved far from where it began."""


def norm_of_r4f(linear):
    register_parametrization(linear, "weight", SpectralNorm(linear.weight.detach()))
    return linear


class Scaled(nn.Module):
    """A trained factor of a weight."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return self.factor * weight


def spectral_norm_then_scale(linear):
    register_parametrization(spectral_norm(linear), "weight", Scaled())
    return linear


@pytest.mark.parametrize("normalise", [norm_of_r4f, spectral_norm])
def test_an_averaged_spectral_norm_is_of_the_averaged_weight_in_the_swap_and_in_the_folder(
    normalise, tmp_path
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), normalise(nn.Linear(5, 4))).train()
    averager = averaged(model)
    live, buffers = model[1].weight.detach(), [b.clone() for b in model.buffers()]
    random_state = torch.get_rng_state()
    with averager.swapped_in():
        weight = model.eval()[1].parametrizations.weight.original.detach().double()
        expected = (weight / torch.linalg.svdvals(weight)[0]).float()
        assert torch.allclose(model[1].weight, expected, rtol=1e-5)
        averager.save_pretrained(tmp_path / "inside")
        swaft.averaging.save_pretrained(averager.engine, tmp_path / "live")
    averager.save_pretrained(tmp_path / "outside")
    inside, outside, last = (
        load_file(tmp_path / name / "model.safetensors")["1.weight"] for name in ("inside", "outside", "live")
    )
    assert torch.equal(inside, outside)
    assert torch.allclose(outside, expected, rtol=1e-5)
    assert all(map(torch.equal, model.buffers(), buffers))
    assert torch.equal(last, model.eval()[1].weight)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert live.shape == expected.shape


def test_what_a_parametrization_trains_is_averaged_and_written_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), spectral_norm_then_scale(nn.Linear(5, 4)))
    averager = averaged(model)
    averager.save_pretrained(tmp_path / "out")
    with averager.swapped_in():
        assert model[1].parametrizations.weight[1].factor != 1
        assert torch.allclose(
            load_file(tmp_path / "out" / "model.safetensors")["1.weight"], model.eval()[1].weight, rtol=1e-5
        )


def test_a_parametrization_without_buffers_needs_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), weight_norm(nn.Linear(5, 4)))
    averager = averaged(model, steps=3)
    averager.save_pretrained(tmp_path / "out")
    with averager.swapped_in():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["1.weight"], model[1].weight)


def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 4))


def rows() -> list[torch.Tensor]:
    return list(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(7)) + 1)


@pytest.mark.parametrize(
    "batches",
    [rows, lambda: [(x, None) for x in rows()], lambda: [{"input": x} for x in rows()]],
    ids=["tensors", "tuples", "mappings"],
)
def test_running_statistics_of_an_average_are_those_of_torchs_update_bn(batches, tmp_path):
    model = with_norm()
    averager = averaged(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with averager.swapped_in():
        expected = copy.deepcopy(model)
    update_bn(rows(), expected)
    modes, random_state = [part.training for part in model.modules()], torch.get_rng_state()
    averager.update_bn(batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert model[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), random_state)
    averager.save_pretrained(tmp_path / "out")
    with averager.swapped_in():
        averager.save_pretrained(tmp_path / "inside")
        saved, inside = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "inside"))
        for name in ("running_mean", "running_var"):
            assert torch.equal(getattr(model[1], name), getattr(expected[1], name))
            assert torch.equal(saved[f"1.{name}"], getattr(expected[1], name))
            assert torch.equal(inside[f"1.{name}"], saved[f"1.{name}"])
            assert not torch.equal(before[f"1.{name}"], getattr(expected[1], name))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_of_instances_are_the_means_of_all_batches():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True)
    )
    averager = averaged(model)
    averager.update_bn(rows())
    with averager.swapped_in():
        seen = torch.stack([model[1](model[0](batch)) for batch in rows()])
        assert torch.allclose(model[2].running_mean, seen.mean((0, 1, 3)), atol=1e-6)
        assert torch.allclose(model[2].running_var, seen.var(3).mean((0, 1)), atol=1e-5)
    assert model[2].momentum == 0.1


def test_torchs_default_for_new_tensors_does_not_round_statistics():
    model = with_norm()
    averager, batches = averaged(model), rows()
    averager.update_bn(batches)
    with averager.swapped_in():
        expected = model[1].running_mean.clone()
    try:
        torch.set_default_dtype(torch.bfloat16)
        averager.update_bn(batches)
    finally:
        torch.set_default_dtype(torch.float32)
    with averager.swapped_in():
        assert torch.equal(model[1].running_mean, expected)


def test_statistics_belong_to_one_average_with_its_members_and_are_not_used_for_others(caplog):
    model = with_norm()
    averager = averaged(model, rule={"swa": swaft.SWA(start=0), "lawa": swaft.LAWA(last=4)})
    live = model[1].running_mean.clone()
    averager.update_bn(rows(), "lawa")
    with averager.swapped_in("lawa"):
        assert not torch.equal(model[1].running_mean, live)
    with averager.swapped_in("swa"):
        assert torch.equal(model[1].running_mean, live)
    averager._counts["lawa"] += 1  # as another member does
    with caplog.at_level("WARNING", logger="swaft"), averager.swapped_in("lawa"):
        assert torch.equal(model[1].running_mean, live)
    assert "this average has taken in members since its running statistics were computed" in caplog.text


def test_statistics_belong_to_an_average_however_it_is_asked_for_and_to_no_blend_of_it(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averager = averaged(model, steps=15, rule=swaft.Windows(blocks=4))
    live, rows = model[1].running_mean.clone(), [(torch.randn(8, 3),) for _ in range(3)]
    averager.update_bn(rows, swaft.Readout(start=8))
    caplog.clear()
    for same in (swaft.Readout(start=8), swaft.Readout(start=0.54), swaft.Readout(start=8, end=15)):
        with averager.swapped_in(same):
            assert not torch.equal(model[1].running_mean, live)
    assert not caplog.records
    for other in (swaft.Readout(start=8, blend=0.5), swaft.Readout(start=4)):
        caplog.clear()
        with averager.swapped_in(other):
            assert torch.equal(model[1].running_mean, live)
        assert "so the last ones are taken; call averager.update_bn(loader, readout)" in caplog.text
    caplog.clear()
    with averager.swapped_in(swaft.Readout(start=8, blend=0)):
        assert torch.equal(model[1].running_mean, live)
    assert not caplog.records


def test_statistics_without_a_batch_are_refused_and_the_live_model_is_back():
    model = with_norm()
    averager = averaged(model)
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AveragingError, match="a batch number 1"):
        averager.update_bn([])
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_running_statistics_reads_no_rows_for_them():
    averager = averaged(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), steps=3)
    averager.update_bn(iter(lambda: pytest.fail("a batch was read"), None))


class Codebook(nn.Module):
    """A table that training moves without the optimizer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(6))
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))

    def forward(self, x):
        if self.training:
            self.codes.mul_(0.9)
        return x * self.codes * self.mask


def test_buffers_that_training_changes_are_warned_of_at_attach_or_once_they_have_changed(caplog):
    with caplog.at_level(logging.WARNING, logger="swaft"):
        averaged(with_norm(), steps=3)
    assert "1 layers keep running statistics (1, ...)" in caplog.text
    assert "averager.update_bn(loader)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="swaft"):
        averager = averaged(nn.Sequential(nn.Linear(6, 6), Codebook()), steps=3)
        assert not caplog.text
        for _ in range(2):
            with averager.swapped_in():
                pass
    assert caplog.text.count("training has changed buffers, which are not averaged (1.codes)") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="swaft"):
        averager = averaged(nn.Sequential(nn.Linear(6, 5), spectral_norm(nn.Linear(5, 4))), steps=3)
        with averager.swapped_in():
            pass
    assert not caplog.text
