"""The averager in one process, against means taken by hand."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from small_runs import attached, flat, take_step, training
from torch import nn

import swaft
from swaft.averaging import save_pretrained
from swaft.averaging.arithmetic import reference_mean
from swaft.errors import AveragingError, LayoutError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.5, 5)])
def test_swa_is_the_mean_of_the_weights_from_its_start_on(start, first):
    _, _, averager, recorded = training(swaft.SWA(start=start), steps=10)
    assert averager.num_averaged == averager.plan().num_members == 11 - first
    expected = torch.stack(recorded[first:]).double().mean(0).float()
    assert torch.allclose(averager.shard(), expected, rtol=1e-7, atol=1e-9)


def test_calling_step_on_every_micro_batch_changes_nothing():
    _, _, once, _ = training(swaft.SWA(start=2))
    _, _, often, _ = training(swaft.SWA(start=2), during=lambda _, averager: [averager.step()] * 3)
    assert once.num_averaged == often.num_averaged == 7
    assert torch.equal(once.shard(), often.shard())


def test_attaching_and_swapping_leave_training_bit_for_bit_as_it_was():
    def swap(model, averager):
        # The swap's forward draws dropout masks of its own, so the stream of the run is put back around it.
        state = torch.get_rng_state()
        if averager.num_averaged:
            with averager.swapped_in():
                model(torch.zeros(1, 5)).sum().item()
        torch.set_rng_state(state)

    plain, averaged, swapped = (
        training(rule, during=during)[0]
        for rule, during in ((None, None), (swaft.SWA(start=0.5), None), (swaft.SWA(start=0.5), swap))
    )
    assert torch.equal(flat(plain), flat(averaged))
    assert torch.equal(flat(plain), flat(swapped))


def test_an_exception_inside_a_swap_leaves_the_live_weights_in_place():
    model, _, averager, recorded = training(swaft.SWA(start=2))
    with pytest.raises(RuntimeError, match="evaluation broke"), averager.swapped_in():
        raise RuntimeError("evaluation broke")
    assert torch.equal(flat(model), recorded[-1])
    with averager.swapped_in():
        assert torch.equal(flat(model), averager.shard())


def test_a_swap_before_the_first_member_is_refused():
    _, early = attached(nn.Linear(2, 2), rule=swaft.SWA(start=5))
    with (
        pytest.raises(AveragingError, match=r"nothing is averaged yet.*start earlier"),
        early.swapped_in(),
    ):
        pass


def test_a_nested_swap_is_refused_and_the_outer_one_survives():
    model, _, averager, recorded = training(swaft.SWA(start=2))
    with averager.swapped_in():
        with pytest.raises(AveragingError, match="swapped in already"), averager.swapped_in():
            pass
        assert torch.equal(flat(model), averager.shard())
    assert torch.equal(flat(model), recorded[-1])


def test_missed_members_are_an_error_not_a_gap():
    model = nn.Linear(2, 2)
    optimizer, averager = attached(model)
    for _ in range(3):
        take_step(model, optimizer)
    with pytest.raises(AveragingError, match="call after every optimizer step"):
        averager.step()


@pytest.mark.parametrize("taken", [0, 3], ids=["never", "no more"])
@pytest.mark.parametrize(
    "read",
    [
        lambda averager, folder: averager.swapped_in().__enter__(),
        lambda averager, folder: averager.save_pretrained(folder / "out"),
        lambda averager, folder: averager.save_state(folder / "out"),
        lambda averager, folder: averager.drift(),
        lambda averager, folder: averager.lane_shards(),
    ],
    ids=["swap", "export", "state", "drift", "lanes"],
)
def test_an_average_that_was_not_told_of_the_steps_is_not_read(tmp_path, read, taken):
    model = nn.Linear(3, 2)
    optimizer, averager = attached(model)
    for step in range(taken + 3):
        take_step(model, optimizer)
        if step < taken:
            averager.step()
    with pytest.raises(AveragingError, match=rf"3 steps since the last.*step {taken + 1} among them"):
        read(averager, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", [swaft.EMA(), swaft.LAWA(last=2), swaft.Windows()])
def test_an_average_may_be_read_before_the_latest_step_is_told_and_after_it_was_closed(rule, tmp_path):
    model = nn.Linear(3, 2)
    optimizer, averager = attached(model, rule=rule, spill_dir=tmp_path)
    for _ in range(6):
        take_step(model, optimizer)
        averager.step()
    take_step(model, optimizer)
    before = averager.shard().clone()
    averager.close()
    for _ in range(3):
        take_step(model, optimizer)
    assert torch.equal(averager.shard(), before)


def test_an_average_of_the_announced_steps_may_be_read_after_further_ones():
    model = nn.Linear(3, 2)
    optimizer, averager = attached(model, total_steps=4)
    for step in range(8):
        take_step(model, optimizer)
        if step < 4:
            averager.step()
    with averager.swapped_in():
        assert averager.num_averaged == 5


def test_parameters_that_are_resized_in_place_are_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2))
    optimizer, averager = attached(model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    averager.step()
    model[0].weight.data = torch.ones(7, 2)  # as resize_token_embeddings does
    for read in (averager.save_pretrained, averager.save_state, partial(save_pretrained, averager.engine)):
        with pytest.raises(LayoutError, match=r"'0\.weight' has shape \(7, 2\), and had \(5, 2\)"):
            read(tmp_path / "out")


def test_an_average_that_never_moves_is_an_error():
    model = nn.Linear(2, 2)
    optimizer, averager = attached(model, lr=0.0)
    for _ in range(3):
        take_step(model, optimizer)
        averager.step()
    with pytest.raises(AveragingError, match="bit for bit"), averager.swapped_in():
        pass


def test_storage_that_is_replaced_at_every_step_is_followed():
    """`weight.data = weight.data.clamp(...)` is a common way to clip weights."""

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer, averager = attached(model, rule=swaft.SWA(start=1))
    members = []
    for _ in range(8):
        take_step(model, optimizer)
        model[0].weight.data = model[0].weight.data.clamp(-0.3, 0.3)
        averager.step()
        members.append(flat(model))
    assert torch.equal(averager.shard(), reference_mean(members, [1 / (n + 1) for n in range(8)]))


@pytest.mark.parametrize(
    "loaded", ["others", "a part", "the same", "others, with their averages", "others, before a start"]
)
def test_weights_loaded_over_the_first_member_are_refused(tmp_path, loaded):
    rule = swaft.SWA(start=1 if loaded.endswith("start") else 0)
    before, model = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    (_, old), (optimizer, averager) = (attached(each, rule=rule) for each in (before, model))
    if loaded == "a part":
        model[0].load_state_dict(before[0].state_dict())
    else:
        model.load_state_dict((model if loaded == "the same" else before).state_dict())
    if loaded.endswith("averages"):
        old.save_state(tmp_path / "state")
        averager.load_state(tmp_path / "state")
    for _ in range(2):
        take_step(model, optimizer)
        refused = pytest.raises(AveragingError, match="load weights before the averager is attached")
        with refused if loaded in ("others", "a part") else nullcontext():
            averager.step()


def test_a_parameter_that_becomes_trainable_later_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer, averager = attached(model)
    model[0].requires_grad_(True)
    with pytest.raises(LayoutError, match=r"'0\.weight' became trainable"), averager.swapped_in():
        pass
    for _ in range(2):
        take_step(model, optimizer)
        with pytest.raises(LayoutError, match=r"'0\.weight' became trainable"):
            averager.step()
    assert averager.num_averaged == 1
    model[0].requires_grad_(False)  # what was averaged by then is not lost
    averager.shard_together(averager.chosen(None))


def test_a_step_that_a_fused_optimizer_skips_by_itself_is_not_counted():
    model, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu")
    optimizer, averager = attached(model, build=partial(torch.optim.AdamW, fused=True))
    for value in (1.0, torch.inf, 1.0):
        scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        averager.step()
    assert averager.applied_steps == 2
    assert averager.num_averaged == 3


def test_two_averagers_of_one_model_know_of_each_others_swap(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = (swaft.SWA(start=0), swaft.EMA(decay=0.5))
    swa, ema = (swaft.WeightAverager(model, optimizer, rule=rule, total_steps=6) for rule in rules)
    for _ in range(6):
        take_step(model, optimizer)
        swa.step()
        ema.step()
    live = flat(model)
    with swa.swapped_in():
        with pytest.raises(AveragingError, match="swapped in already"), ema.swapped_in():
            pass
        assert torch.equal(ema.engine.live_shard(), live)
        swaft.averaging.save_pretrained(ema.engine, tmp_path / "live")
    saved = load_file(tmp_path / "live" / "model.safetensors")
    assert torch.equal(torch.cat([saved[name].flatten() for name in model.state_dict()]), live)


@pytest.mark.parametrize("swapped", ["whole", "part"])
def test_averagers_of_a_model_and_of_a_part_of_it_know_of_each_others_swap(swapped):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    of = {
        name: swaft.WeightAverager(module, optimizer, rule=swaft.SWA(start=0), total_steps=4)
        for name, module in (("whole", model), ("part", model[0]))
    }
    for _ in range(3):
        take_step(model, optimizer)
        for averager in of.values():
            averager.step()
    inside, other = of.pop(swapped), *of.values()
    take_step(model, optimizer)
    inside.step()
    live = flat(model)
    with inside.swapped_in():
        for call in (other.step, other.drift, lambda: other.swapped_in().__enter__()):
            with pytest.raises(AveragingError, match="swapped in"):
                call()
    assert torch.equal(flat(model), live)
    other.step()
    assert other.count() == 5


def test_averagers_of_two_models_that_share_a_frozen_part_do_not_see_each_others_swap():
    shared = nn.Linear(5, 7).requires_grad_(False)
    models = [nn.Sequential(shared, nn.Linear(7, 3)) for _ in range(2)]
    averagers = []
    for model in models:
        optimizer, averager = attached(model)
        take_step(model, optimizer)
        averager.step()
        averagers.append(averager)
    live = [flat(model) for model in models]
    with averagers[0].swapped_in(), averagers[1].swapped_in():  # an ensemble of both
        assert not any(torch.equal(flat(model), each) for model, each in zip(models, live, strict=True))
    assert all(torch.equal(flat(model), each) for model, each in zip(models, live, strict=True))


def test_a_model_with_a_frozen_part_knows_of_a_swap_of_the_model_that_trains_it():
    shared = nn.Linear(5, 7)
    whole = nn.Sequential(shared, nn.Linear(7, 3))
    optimizer, averager = attached(whole)
    take_step(whole, optimizer)
    averager.step()
    shared.requires_grad_(False)
    other = attached(nn.Sequential(shared, nn.Linear(7, 2)))[1]
    with (
        averager.swapped_in(),
        pytest.raises(AveragingError, match="swapped in"),
        other.swapped_in(),
    ):
        pass


def test_a_trainable_parameter_outside_the_optimizer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(LayoutError, match=r"'1\.weight'.*requires_grad_"):
        swaft.WeightAverager(
            model, torch.optim.SGD(model[0].parameters(), lr=0.1), rule=swaft.SWA(), total_steps=9
        )


def test_an_optimizer_of_another_model_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(LayoutError, match="does not"):
        swaft.WeightAverager(
            model, torch.optim.SGD(other.parameters(), lr=0.1), rule=swaft.SWA(), total_steps=9
        )


def test_what_an_optimizer_trains_outside_of_the_model_is_left_out_with_a_warning(caplog):
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*criterion.parameters(), *model.parameters()], lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=2)
    assert "2 of the optimizer's 6 trained parameters are not in the model" in caplog.text
    part = swaft.WeightAverager(model[0], optimizer, rule=swaft.SWA(start=0), total_steps=2)
    members = [flat(model)]
    for _ in range(2):
        criterion(model(torch.ones(1, 3))).square().sum().backward()
        optimizer.step()
        averager.step()
        part.step()
        members.append(flat(model))
    mean = torch.stack(members).double().mean(0).float()
    assert torch.allclose(averager.shard(), mean, atol=1e-7)
    assert torch.allclose(part.shard(), mean[: part.engine.numel], atol=1e-7)
    criterion.weight.device_mesh = object()  # FSDP2's, which may gather the model's weights with it
    with pytest.raises(LayoutError, match=r"outside of the model.*sharded by FSDP2"):
        swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=2)


def test_frozen_parameters_are_not_averaged_and_tied_ones_once():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    _, averager = attached(model)
    assert averager.engine.numel == 24


def test_a_compiled_model_is_averaged_like_any_other():
    model = nn.Linear(3, 2)
    compiled = torch.compile(model, backend="eager")
    optimizer, averager = attached(compiled)
    take_step(compiled, optimizer)
    averager.step()
    live = compiled(torch.ones(1, 3)).detach()
    with averager.swapped_in():
        assert not torch.equal(compiled(torch.ones(1, 3)), live)
    assert torch.equal(compiled(torch.ones(1, 3)), live)


def calls_of_one_event(num_layers: int) -> int:
    """Function calls, Python's and C's, of one averaging event in the steady state."""
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(num_layers))
    frozen = nn.ModuleList(nn.Linear(4, 4) for _ in range(num_layers)).requires_grad_(False)
    optimizer, averager = attached(nn.ModuleList([model, frozen]))
    counted = 0

    def profile(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        counted = 0
        sys.setprofile(profile)
        averager.step()
        sys.setprofile(None)
    return counted


def test_an_event_loops_over_no_parameters():
    assert calls_of_one_event(10) == calls_of_one_event(500)
