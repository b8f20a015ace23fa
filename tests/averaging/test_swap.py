"""What may be done to a model while an average is in it: the rest is refused, and nothing of it gets out."""

from __future__ import annotations

import copy
import io
import pickle
import time
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import attached, averaged, take_step
from torch import nn

import swaft
from swaft.averaging import save_pretrained
from swaft.errors import AveragingError, LayoutError

pytestmark = pytest.mark.unit


def nested():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3))


def values(model) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


READERS = {
    "state_dict": lambda m: m.state_dict(),
    "state_dict of a part": lambda m: m[0][1].state_dict(),
    "state_dict of a wrapper": lambda m: nn.Sequential(m).state_dict(),
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
    "torch.save of a part": lambda m: torch.save(m[0], io.BytesIO()),
    "torch.save of what holds it": lambda m: torch.save({"model": m}, io.BytesIO()),
    "pickle": lambda m: pickle.dumps(m[0][0]),
}
STATE = nested().state_dict()
WRITERS = {
    "load_state_dict": lambda m: m.load_state_dict(STATE),
    "load_state_dict by assignment": lambda m: m.load_state_dict(STATE, assign=True),
    "load_state_dict of a part": lambda m: m[1].load_state_dict(nested()[1].state_dict()),
}


@pytest.mark.parametrize("call", [*READERS, *WRITERS])
def test_what_hands_out_or_replaces_weights_is_refused_inside_a_swap_and_works_after_it(call):
    model = nested()
    averager = averaged(model)
    live = values(model)
    act = (READERS | WRITERS)[call]
    with averager.swapped_in():
        before = values(model)
        with pytest.raises(AveragingError, match="averaged weights are swapped in"):
            act(model)
        assert all(map(torch.equal, values(model), before))
    assert all(map(torch.equal, values(model), live))
    act(model)


def write(model):
    model[1].weight.data.mul_(2.0)


def replace(model):
    model[1].weight = nn.Parameter(torch.zeros(3, 5))


def unload(model):
    model[1] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (write, AveragingError, "what was written is lost"),
        (replace, LayoutError, "'1.weight' is another parameter"),
        (unload, LayoutError, "'1.bias' was there when the averager was attached, and is gone"),
    ],
)
def test_weights_written_past_every_call_are_an_error_at_the_end_with_the_live_ones_back(
    change, error, message
):
    model = nested()
    averager = averaged(model)
    part, live = model[0][0], values(model[0][0])
    with pytest.raises(error, match=message), averager.swapped_in():
        change(model)
    assert all(map(torch.equal, values(part), live))
    assert not averager.engine.swap.active


def test_an_embedding_that_rescales_its_rows_in_every_forward_is_no_change(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2))
    optimizer, averager = attached(model, lr=0.3)
    line = averager._averages.pipeline
    monkeypatch.setattr(line, "_sum", lambda values, agree=line._sum: time.sleep(0.02) or agree(values))
    for _ in range(3):  # each forward begins long before the member has been read
        take_step(model, optimizer, torch.arange(9))
        averager.step()
    averager.wait()
    live = values(model)
    with averager.swapped_in():
        model[0].weight.data.mul_(3.0)
        model(torch.arange(9))
    assert all(map(torch.equal, values(model), live))


def test_a_swap_waits_until_another_averager_of_the_model_has_read_its_member(monkeypatch):
    model = nested()
    optimizer, first = attached(model)
    second = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    line = second._averages.pipeline
    monkeypatch.setattr(line, "_sum", lambda values, agree=line._sum: time.sleep(0.05) or agree(values))
    for _ in range(2):
        take_step(model, optimizer, torch.randn(8, 6))
        first.step()
        second.step()
    with first.swapped_in():
        pass
    assert torch.equal(second.shard(), first.shard())


def test_a_deep_copy_made_inside_a_swap_holds_the_average_and_refuses_nothing():
    model = nested()
    averager = averaged(model)
    with averager.swapped_in():
        copied = copy.deepcopy(model)
    assert torch.equal(torch.cat([p.detach().flatten() for p in copied.parameters()]), averager.shard())
    torch.save(copied, io.BytesIO())
    copied.load_state_dict(copied.state_dict())


def test_a_swap_leaves_no_hook_on_the_model():
    model = nested()
    averager = averaged(model)
    held = [
        (len(part._state_dict_pre_hooks), len(part._load_state_dict_pre_hooks)) for part in model.modules()
    ]
    for _ in range(2):
        with averager.swapped_in():
            pass
    assert held == [
        (len(part._state_dict_pre_hooks), len(part._load_state_dict_pre_hooks)) for part in model.modules()
    ]


def test_one_autocast_around_everything_sees_the_weights_that_are_in_the_model():
    """Autocast keeps the 16-bit casts of weights until its outermost region ends, also without gradients."""
    model = nested().eval()
    averager, rows = averaged(model), torch.randn(4, 6)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)

    @torch.no_grad()
    def outputs():
        with autocast():
            found = [model(rows)]
        for readout in (None, swaft.Readout(blend=0.5)):
            with averager.swapped_in(readout), autocast():
                found.append(model(rows))
            with autocast():
                found.append(model(rows))
        return found

    expected = outputs()
    assert not torch.equal(expected[0], expected[1])
    with autocast():
        assert all(map(torch.equal, outputs(), expected))


def test_statistics_that_an_evaluation_in_training_mode_changes_are_put_back(tmp_path):
    model = nested()
    averager = averaged(model)
    live = values(model)
    with averager.swapped_in():
        model.train()
        model(torch.randn(8, 6) + 5)
        save_pretrained(averager.engine, tmp_path / "live")
    assert all(map(torch.equal, values(model), live))
    saved = load_file(tmp_path / "live" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_the_distance_from_the_live_weights_is_the_same_inside_a_swap(tmp_path, caplog):
    averager = averaged(model := nested())
    live = torch.cat([each.detach().double().flatten() for each in model.parameters()])
    outside = averager.drift()
    with averager.swapped_in():
        mean = torch.cat([each.detach().double().flatten() for each in model.parameters()])
    assert outside == pytest.approx((mean - live).norm().item(), rel=1e-12)
    assert averager.drift(swaft.Readout(blend=0.5)) == pytest.approx(outside / 2, rel=1e-6)
    with caplog.at_level("INFO", logger="swaft.averaging.export"):
        averager.save_pretrained(tmp_path / "outside", dtype=torch.bfloat16)
        with averager.swapped_in():
            assert averager.drift() == outside > 0
            averager.save_pretrained(tmp_path / "inside", dtype=torch.bfloat16)
    told = [record.message.split(": ", 1)[1] for record in caplog.records if record.name.endswith("export")]
    assert told[0] == told[1]
    lost = (mean - mean.bfloat16().double()).norm().item() / outside
    assert f", {lost:.2g} of their distance from the last weights" in told[0]


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = get_peft_model(nested(), LoraConfig(r=2, target_modules=r"1|0\.0", init_lora_weights=False))
    return model, averaged(model)


def test_adapters_that_stay_merged_inside_a_swap_are_unmerged_and_an_error(adapted):
    model, averager = adapted
    rows = torch.randn(4, 6)
    before = model.eval()(rows).detach()
    with (
        pytest.raises(AveragingError, match="merged while averaged weights were swapped in"),
        averager.swapped_in(),
    ):
        model.merge_adapter()
    assert torch.allclose(model(rows), before, atol=1e-6)
    with averager.swapped_in():
        during = model(rows)
        model.merge_adapter()
        assert torch.allclose(model(rows), during, atol=1e-6)
        model.unmerge_adapter()


def test_a_swap_of_merged_adapters_is_refused_as_it_would_change_nothing(adapted):
    model, averager = adapted
    model.merge_adapter()
    with pytest.raises(AveragingError, match="unmerge them first"), averager.swapped_in():
        pass
