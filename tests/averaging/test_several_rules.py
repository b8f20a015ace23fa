"""One averager, several rules, one copy of every member; and what else is new to a caller."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import psutil
import pytest
import torch
from small_runs import attached, flat, take_step, training
from torch import nn

import swaft
from swaft.averaging.arithmetic import reference_mean
from swaft.averaging.engines.steps import require_same
from swaft.errors import AveragingError, ConfigError

pytestmark = pytest.mark.unit


def test_every_rule_has_its_own_average_and_the_first_is_the_default():
    rules = {"swa": swaft.SWA(start=4), "ema": swaft.EMA(decay=0.5, start=2, every=2)}
    model, _, averager, recorded = training(rules)
    swa = reference_mean(recorded[4:], [1 / (n + 1) for n in range(5)])
    ema = reference_mean(recorded[2::2], [1, 0.5, 0.5, 0.5])
    assert averager.rules == ("swa", "ema")
    assert torch.equal(averager.shard(), swa)
    assert torch.equal(averager.shard("ema"), ema)
    with averager.swapped_in("ema"):
        assert torch.equal(flat(model), ema)
    with averager.swapped_in():
        assert torch.equal(flat(model), swa)
    assert torch.equal(flat(model), recorded[-1])


def test_a_rule_that_is_not_there_is_named_with_those_that_are():
    _, _, averager, _ = training({"swa": swaft.SWA(), "ema": swaft.EMA()})
    with pytest.raises(AveragingError, match=r"'best'.*swa, ema"), averager.swapped_in("best"):
        pass


def test_all_problems_of_all_rules_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        training({"swa": swaft.SWA(start=99), "ema": swaft.EMA(decay=2.0)}, precision="double")
    assert len(caught.value.problems) == 3


def test_the_plain_form_is_the_same_mean_with_fewer_digits():
    _, _, exact, recorded = training(swaft.SWA(start=0))
    _, _, plain, _ = training(swaft.SWA(start=0), precision="plain")
    oracle = torch.stack(recorded).double().mean(0)
    assert not torch.equal(plain.shard(), exact.shard())
    assert torch.allclose(plain.shard().double(), oracle, rtol=1e-6, atol=1e-8)


def test_the_forecast_counts_what_the_run_will_take():
    rules = {"swa": swaft.SWA(start=0.5, every=2), "ema": swaft.EMA(start=0.25, every=3)}
    _, _, averager, _ = training(rules, steps=12)
    forecast = averager.forecast()
    assert forecast.elements == 5 * 7 + 7 + 7 * 3 + 3
    assert forecast.events == len({6, 8, 10, 12} | {3, 6, 9, 12})
    assert forecast.host_bytes == 2 * 6 * forecast.elements
    assert forecast.swap_bytes == 4 * forecast.elements  # the masters are the weights, so a swap stashes them
    assert forecast.copied_bytes == forecast.pinned_bytes == 0  # the masters are in host memory
    assert forecast.seconds > 0


def test_host_memory_is_six_bytes_an_element_a_rule_and_nothing_grows_with_the_steps():
    model = nn.Linear(4000, 4000, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    process, numel = psutil.Process(), model.weight.numel()
    before = process.memory_info().rss
    rules = {"swa": swaft.SWA(start=0), "ema": swaft.EMA()}
    averager = swaft.WeightAverager(model, optimizer, rule=rules, total_steps=99)
    for _ in range(5):
        model.weight.grad.normal_()
        optimizer.step()
        averager.step()
    averager.wait()
    grown = process.memory_info().rss - before
    assert grown <= 2 * 6 * numel + 48 * 2**20
    assert grown >= 2 * 6 * numel * 0.9  # or the measurement sees nothing


def test_a_second_averagers_swap_waits_until_the_first_has_read_the_weights():
    """In fp32 a swap writes to the very storage that the other's worker may still be reading."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    start = flat(model)
    optimizer, one = attached(model)
    two = swaft.WeightAverager(model, optimizer, rule=swaft.EMA(0.5), total_steps=9)
    take_step(model, optimizer)
    waits = one.waits.count  # a step may have waited for the first member, on a busy machine
    held = threading.Event()
    one._averages.pipeline._sum = lambda values: held.wait(10) and values
    one.step()
    two.step()
    live = flat(model)
    threading.Timer(0.1, held.set).start()
    with two.swapped_in():
        assert not torch.equal(flat(model), live)
    assert torch.equal(one.shard(), reference_mean([start, live], [1, 0.5]))
    assert one.waits.count == waits + 1


def test_a_checkpoint_loaded_into_the_model_waits_until_the_weights_are_read():
    model = nn.Linear(64, 64)
    optimizer, averager = attached(model)
    first = flat(model)
    take_step(model, optimizer)
    second = flat(model)
    held = threading.Event()
    averager._averages.pipeline._sum = lambda values: held.wait(10) and values
    averager.step()
    threading.Timer(0.1, held.set).start()
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert torch.equal(averager.shard(), reference_mean([first, second], [1, 0.5]))


def test_a_step_count_that_goes_back_is_an_error():
    *_, averager, _ = training(swaft.SWA(start=0))
    averager.engine._steps_seen.count = 3
    with pytest.raises(AveragingError, match="went back from 8 to 3"):
        averager.step()


def test_an_averager_that_nobody_needs_ends_its_threads_and_takes_its_hooks_along():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = threading.active_count()
    for _ in range(20):
        averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
        averager.wait()
        gone = weakref.ref(averager)
        del averager
        gc.collect()
        assert gone() is None
    assert threading.active_count() <= before + 1
    assert len(optimizer._optimizer_step_pre_hooks) <= 4
    take_step(model, optimizer)


def test_what_is_wrong_with_a_member_is_raised_by_the_step_after_it():
    model = nn.Linear(5, 3)
    optimizer, averager = attached(model)
    start = averager.shard().clone()
    take_step(model, optimizer)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    averager.step()
    take_step(model, optimizer)
    with pytest.raises(AveragingError, match="after step 1 are not finite"):
        averager.step()
    with pytest.raises(AveragingError, match="after step 2 are not finite"):
        averager.wait()
    assert averager.num_averaged == 1
    assert torch.equal(averager.shard(), start)


def test_training_goes_on_after_a_refused_member_for_whoever_catches_the_error():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer, averager = attached(model, rule=swaft.SWA(start=1))
    members = []
    for step in range(5):
        take_step(model, optimizer)
        sound = flat(model)
        if step == 0:
            with torch.no_grad():
                model.weight[0, 0] = torch.inf
        try:
            averager.step()
        except AveragingError as refusal:
            assert "after step 1 are not finite" in str(refusal)
        if step == 0:
            averager._averages.pipeline.release_masters()
            with torch.no_grad():
                model.weight.copy_(sound[:15].view(3, 5))
        else:
            members.append(sound)
    assert averager.num_averaged == 4
    assert torch.equal(averager.shard(), reference_mean(members, [1 / (n + 1) for n in range(4)]))


def test_one_step_more_than_was_planned_is_told_at_once_and_loses_nothing():
    rules = {"windows": swaft.Windows(blocks=2), "swa": swaft.SWA(start=0)}
    model, optimizer, averager, _ = training(rules, steps=8)
    before = averager.shard().clone()
    take_step(model, optimizer)
    with pytest.raises(AveragingError, match="total_steps"):
        averager.step()
    assert torch.equal(averager.shard(), before)
    assert averager.count("swa") == 9


def test_a_step_reported_inside_a_swap_is_refused():
    """Its weights would be the average."""
    model, optimizer, averager, _ = training(swaft.SWA(start=0))
    other = swaft.WeightAverager(model, optimizer, rule=swaft.EMA(), total_steps=8)
    take_step(model, optimizer)
    with (
        averager.swapped_in(),
        pytest.raises(AveragingError, match="called while averaged weights are swapped in"),
    ):
        other.step()


def test_a_replaced_parameter_is_refused_by_name():
    model, _, averager, _ = training(swaft.SWA(start=0))
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    with pytest.raises(AveragingError, match=r"'3\.weight' is another parameter"), averager.swapped_in():
        pass


def test_a_model_with_an_averager_can_be_pickled():
    model, _, averager, _ = training(swaft.SWA(start=0))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(flat(again), flat(model))
    gone = weakref.ref(averager)
    del averager
    gc.collect()
    assert gone() is None


def test_torchs_defaults_for_new_tensors_do_not_reach_the_averages():
    model, batches = nn.Linear(5, 3), list(torch.randn(8, 4, 5))
    again = copy.deepcopy(model)
    optimizer, averager = attached(model)
    for batch in batches:
        take_step(model, optimizer, batch)
        averager.step()
    expected = averager.shard()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        optimizer, averager = attached(again)
        for batch in batches:
            take_step(again, optimizer, batch)
            averager.step()
        averager.forecast()
        with averager.swapped_in():
            assert torch.equal(averager.shard(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_ctrl_c_while_the_live_weights_come_back_does_not_lose_them(monkeypatch):
    model, _, averager, recorded = training(swaft.SWA(start=0))
    publish = averager.engine.publish
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        publish()

    monkeypatch.setattr(averager.engine, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt), averager.swapped_in():
        pass
    assert torch.equal(flat(model), recorded[-1])
    assert not averager.engine.swap.active


def test_an_average_equal_to_the_live_weights_is_fine_where_training_moved():
    model, _, averager, recorded = training(swaft.Merge(weights=[0, 0, 0, 0, 1], start=4))
    with averager.swapped_in():
        assert torch.equal(flat(model), recorded[-1])


def test_ranks_that_were_given_different_rules_are_told_which():
    with pytest.raises(AveragingError, match=r"rank 2 was given .*start=0\.25.* and rank 0 .*start=0\.5"):
        require_same([repr(swaft.SWA(start=start)) for start in (0.5, 0.5, 0.25)])
    require_same([repr(swaft.SWA())] * 4)


def test_a_rule_given_by_its_name_is_refused_with_what_was_meant():
    with pytest.raises(ConfigError, match=r"'swa' is not a rule, expected swaft\.SWA"):
        training("swa")
    with pytest.raises(ConfigError, match=r"EMA'> is not a rule, expected swaft\.SWA"):
        training(swaft.EMA)
