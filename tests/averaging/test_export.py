from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import swaft
from swaft.averaging import attach_engine, export, save_pretrained
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit


def engine_of(model):
    return attach_engine(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("parametrize", [spectral_norm, weight_norm])
def test_a_parametrized_weight_is_written_as_what_evaluation_uses(parametrize, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), parametrize(nn.Linear(3, 2))).train()
    model(torch.randn(2, 4))
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(saved["1.weight"], model.eval()[1].weight)


def test_a_plain_module_leaves_its_weights_tied_ones_under_both_names(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["0.weight"], model[0].weight)
    assert torch.equal(saved["1.weight"], model[0].weight)


def test_buffers_travel_and_those_that_are_not_persistent_do_not(tmp_path):
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    model(torch.randn(5, 3))
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert torch.equal(saved["running_mean"], model.running_mean)


@pytest.mark.parametrize("make", ["file", "folder with a file"])
def test_nothing_is_overwritten(make, tmp_path):
    target = tmp_path / "out"
    held = target if make == "file" else target / "held"
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    with pytest.raises(AveragingError, match="name another path"):
        save_pretrained(engine_of(nn.Linear(2, 2)), target)
    assert held.read_text() == "mine"


def test_a_write_that_fails_leaves_no_folder_and_says_why(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(AveragingError, match=r"could not be written: SafetensorError: No space left"):
        save_pretrained(engine_of(nn.Linear(2, 2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_average_and_the_last_weights_are_both_to_be_had(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=2)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        averager.step()
    averager.save_pretrained(tmp_path / "averaged")
    save_pretrained(averager.engine, tmp_path / "last")
    averaged, last = (load_file(tmp_path / name / "model.safetensors") for name in ("averaged", "last"))
    assert torch.equal(last["weight"], model.weight)
    assert not torch.equal(averaged["weight"], last["weight"])
