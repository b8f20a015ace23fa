from __future__ import annotations

import pytest
import torch
from soup_folders import folder_of, loaded

import swaft
from swaft.errors import StateError
from swaft.soup import average, open_checkpoint

pytestmark = pytest.mark.unit


def trained(seed, rule):
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=4)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averager.step()
    return averager


def test_saved_averages_are_averaged_and_the_rest_comes_from_the_base(tmp_path):
    paths, exported = [], []
    for seed in range(2):
        averager = trained(seed, swaft.SWA(start=0))
        averager.save_state(tmp_path / f"state{seed}")
        averager.save_pretrained(tmp_path / f"model{seed}")
        paths.append(tmp_path / f"state{seed}")
        exported.append(loaded(tmp_path / f"model{seed}"))
    base = folder_of(
        tmp_path / "base", {"weight": torch.ones(3, 5), "bias": torch.ones(3), "frozen": torch.ones(2)}
    )
    average(paths, tmp_path / "out", base=base)
    found = loaded(tmp_path / "out")
    for name in ("weight", "bias"):
        assert torch.equal(found[name], torch.stack([e[name] for e in exported]).double().mean(0).float())
    assert torch.equal(found["frozen"], torch.ones(2))


@pytest.mark.parametrize(
    "rule",
    [
        swaft.LAWA(last=2),
        swaft.Windows(start=0, blocks=2),
        swaft.BEMA(every=1),
        swaft.PowerEMA(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_an_average_of_several_vectors_is_what_the_run_exports(tmp_path, rule):
    averager = trained(0, rule)
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "model")
    found = open_checkpoint(tmp_path / "state")
    assert torch.equal(found.read("weight", 0, 15), loaded(tmp_path / "model")["weight"].flatten())


def test_a_state_without_members_is_refused(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=4).save_state(
        tmp_path / "state"
    )
    with pytest.raises(StateError, match="nothing is averaged yet"):
        open_checkpoint(tmp_path / "state")


def test_one_of_several_averages_is_chosen_by_name(tmp_path):
    rules = {"a": swaft.SWA(start=0), "b": swaft.EMA(decay=0.5)}
    averager = trained(0, rules)
    averager.save_state(tmp_path / "state")
    with pytest.raises(StateError, match="holds the averages a, b; choose one with --rule"):
        open_checkpoint(tmp_path / "state")
    averager.save_pretrained(tmp_path / "b", "b")
    found = open_checkpoint(tmp_path / "state", rule="b")
    assert torch.equal(found.read("weight", 0, 15), loaded(tmp_path / "b")["weight"].flatten())


def test_a_damaged_state_is_refused(tmp_path):
    trained(0, swaft.SWA(start=0)).save_state(tmp_path / "state")
    (file,) = (tmp_path / "state").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StateError, match=f"{file.name} is damaged"):
        open_checkpoint(tmp_path / "state")
