"""Which optimizer's steps are counted, and that nothing of the counting outlives its engine."""

from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import optimizer as torch_optimizer

import swaft
from swaft.averaging import attach_engine
from swaft.averaging.engines.steps import StepCounter
from swaft.errors import AveragingError, ConfigError, LayoutError, UnsupportedEngineError

pytestmark = pytest.mark.unit


class Lookahead(torch.optim.Optimizer):
    """An optimizer that wraps another, as torch's own users write them."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure=None):
        return self.inner.step(closure)


def trained_by(build=torch.optim.SGD):
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    return model, build(model.parameters(), lr=0.1)


def test_every_step_of_the_optimizer_is_counted():
    _, optimizer = trained_by()
    counter = StepCounter(optimizer)
    for _ in range(3):
        optimizer.step()
    assert counter() == 3


def test_a_step_that_calls_that_of_its_parent_is_one_step_also_where_it_is_tried_again():
    class Own(torch.optim.SGD):
        failed = False

        def step(self, closure=None):
            if self.failed:
                raise RuntimeError("once")
            return super().step(closure)

    model = torch.nn.Linear(2, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)  # from now on the parent's steps are hooked as well
    optimizer = Own(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.failed = True
        with pytest.raises(RuntimeError, match="once"):
            optimizer.step()
        optimizer.failed = False
        optimizer.step()
        averager.step()
    assert (averager.applied_steps, averager.num_averaged) == (3, 4)


def test_once_an_averager_is_closed_others_may_train_the_model():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
    model(torch.ones(1, 2)).sum().backward()
    averager.close()
    torch.optim.AdamW(model.parameters()).step()


def test_another_optimizer_of_the_same_parameters_is_refused_at_its_step():
    model, optimizer = trained_by()
    counter = StepCounter(optimizer)
    rebuilt = torch.optim.AdamW(model.parameters())
    optimizer.step()
    with pytest.raises(AveragingError, match=r"another AdamW than the one.*attach a new averager"):
        rebuilt.step()
    assert counter() == 1


def test_one_shared_parameter_is_enough():
    model, optimizer = trained_by()
    counter = StepCounter(optimizer)
    other = nn.Linear(2, 2)
    both = torch.optim.SGD([*other.parameters(), model.bias], lr=0.1)
    with pytest.raises(AveragingError, match="another SGD"):
        both.step()
    assert counter() == 0


def test_an_optimizer_of_other_parameters_is_left_alone():
    _, optimizer = trained_by()
    counter = StepCounter(optimizer)
    _, other = trained_by()
    other.step()
    assert counter() == 0


def test_an_optimizer_around_the_attached_one_steps_through_it():
    _, inner = trained_by()
    counter = StepCounter(inner)
    outer = Lookahead(Lookahead(inner))
    outer.step()
    outer.step()
    assert counter() == 2


def test_an_optimizer_inside_the_attached_one_is_part_of_its_step():
    _, inner = trained_by()
    outer = Lookahead(inner)
    counter = StepCounter(outer)
    outer.step()
    assert counter() == 1


def test_a_step_that_ends_in_an_error_is_not_counted_and_hides_no_other_optimizer():
    model, optimizer = trained_by()
    counter = StepCounter(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert counter() == 0
    with pytest.raises(AveragingError, match="another SGD"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_training_begins_again_with_a_new_optimizer_and_averager_while_the_old_one_is_still_held():
    """As when a cell of a notebook is run again: a traceback or an accelerator holds the first averager."""
    model, held = trained_by()[0], []
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        held.append(swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9))
        for _ in range(2):
            optimizer.step()
            held[-1].step()
    assert [each.num_averaged for each in held] == [3, 3, 3]
    for each in held[:2]:
        with pytest.raises(
            AveragingError, match="another optimizer now, and a newer averager is attached to it"
        ):
            each.step()
        with each.swapped_in():  # what it has averaged can be read
            assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), each.shard())
    held[-1].close()
    torch.optim.AdamW(model.parameters()).step()


def test_the_newer_averager_takes_over_even_where_it_lets_other_optimizers_step():
    """As the Trainer's does, whose optimizer may be exchanged."""
    model, optimizer = trained_by()
    held = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    optimizer.step()
    held.step()
    newer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, newer, rule=swaft.SWA(start=0), total_steps=9)
    averager.engine.stop()
    newer.step()
    averager.step()
    assert averager.num_averaged == 2


def test_a_new_optimizer_is_free_once_the_averager_of_the_old_one_is_gone():
    model, optimizer = trained_by()
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    gone = weakref.ref(averager)
    del averager
    gc.collect()
    assert gone() is None
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_attaching_again_and_again_leaves_no_hooks_behind():
    model, optimizer = trained_by()

    def hooks() -> int:
        everywhere = (
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        here = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        return sum(map(len, (*everywhere, *here, model._state_dict_pre_hooks)))

    attach_engine(model, optimizer)
    before = hooks()
    for _ in range(100):
        attach_engine(model, optimizer)
    assert hooks() == before


def test_an_engine_dies_with_its_last_reference():
    model, optimizer = trained_by()
    gone = weakref.ref(attach_engine(model, optimizer))
    assert gone() is None


def test_an_object_that_is_collected_in_the_middle_of_a_step_does_not_disturb_it():
    """The collector runs when it likes: also while torch goes through the hooks of an optimizer."""
    _, optimizer = trained_by()
    counters = [StepCounter(optimizer)]
    handle = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: counters.clear())
    survivor = StepCounter(optimizer)
    optimizer.step()
    handle.remove()
    assert survivor() == 1


def standing_at(steps: int, build=torch.optim.AdamW):
    """A model and an optimizer that has taken so many steps."""
    model, optimizer = trained_by(build)
    for _ in range(steps):
        optimizer.step()
    return model, optimizer


def test_a_run_that_is_joined_in_the_middle_is_counted_from_where_the_optimizer_stands(caplog):
    model, optimizer = standing_at(12)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0.75), total_steps=16)
    assert "averaging begins at optimizer step 12 of 16, as the optimizer's state says" in caplog.text
    assert (averager.applied_steps, averager.num_averaged) == (12, 1)
    for _ in range(4):
        optimizer.step()
        averager.step()
    assert (averager.applied_steps, averager.num_averaged) == (16, 5)


def test_a_run_of_zero_redundancy_is_counted_by_the_state_of_this_rank(tmp_path):
    where = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        build = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
        model, optimizer = standing_at(12, build)
        assert StepCounter(optimizer)() == 12
        optimizer.consolidate_state_dict()
        state = optimizer.state_dict()
        model, resumed = trained_by(build)
        resumed._param_to_rank[model.bias] = 1  # as if another rank kept the state of the bias
        resumed.load_state_dict(state)
        assert None in resumed.state.values()
        assert StepCounter(resumed)() == 12
    finally:
        torch.distributed.destroy_process_group()


def test_a_start_that_has_passed_is_an_error_and_no_other_window():
    model, optimizer = standing_at(12)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0.5), total_steps=16)
    optimizer.step()
    with pytest.raises(AveragingError, match=r"step 8 were to be the first member.*attached after that step"):
        averager.step()


def test_the_step_may_be_said_and_then_counts_on_across_a_loaded_state(caplog):
    model, optimizer = standing_at(12)
    with caplog.at_level("INFO", logger="swaft"):
        swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=8, first_step=3)
    assert "averaging begins" not in caplog.text  # whoever says the step may load averages that began before
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0.5), total_steps=8, first_step=0)
    optimizer.step()
    averager.step()
    assert averager.applied_steps == 1
    state = optimizer.state_dict()
    for each in state["state"].values():
        each["step"] = torch.tensor(15.0)
    optimizer.load_state_dict(state)
    optimizer.step()
    averager.step()
    assert averager.applied_steps == 4


def test_a_state_that_is_loaded_after_attaching_moves_the_count_to_its_step():
    _, other = standing_at(12)
    model, optimizer = trained_by(torch.optim.AdamW)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=13), total_steps=16)
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()
    averager.step()
    assert (averager.applied_steps, averager.num_averaged) == (13, 1)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_with_which_torch_only_fills_an_empty_state_is_none(build):
    """As it takes one at each checkpoint of an optimizer without state, and at the first one of the others."""
    model, optimizer = trained_by(build)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
    for _ in range(2):
        optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizer)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        averager.step()
    assert averager.applied_steps == 2
    assert averager.num_averaged == 3
    with averager.swapped_in():
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
    other, its = trained_by(build)
    its.zero_grad()
    late = swaft.WeightAverager(other, its, rule=swaft.SWA(start=0), total_steps=4)
    set_optimizer_state_dict(other, its, state)
    other.load_state_dict(model.state_dict())
    other(torch.ones(1, 3)).sum().backward()
    its.step()
    with pytest.raises(
        AveragingError, match=r"load weights before|after a checkpoint was loaded, not before"
    ):
        late.step()


def test_steps_of_a_compiled_optimizer_are_counted_without_a_warning():
    model, optimizer = trained_by()
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
    step = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo does not know")
        for _ in range(2):
            step()
            averager.step()
    assert averager.num_averaged == 3


def test_a_run_past_its_end_is_refused_as_its_length_must_be_that_of_a_part():
    model, optimizer = standing_at(12)
    with pytest.raises(AveragingError, match=r"is at optimizer step 12.*total_steps=10.*first_step=0"):
        swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=10)
    with pytest.raises(ConfigError, match="first_step is -1"):
        swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=10, first_step=-1)


def test_a_state_that_does_not_say_its_step_is_counted_from_0_with_a_warning_unless_it_is_said(caplog):
    model, optimizer = standing_at(12, partial(torch.optim.SGD, momentum=0.9))
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=16)
    assert averager.applied_steps == 0
    assert "does not say after how many steps" in caplog.text
    caplog.clear()
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=16, first_step=12)
    assert averager.applied_steps == 12
    assert "does not say" not in caplog.text
    plain, sgd = trained_by()
    sgd.step()
    swaft.WeightAverager(plain, sgd, rule=swaft.SWA(), total_steps=16)
    assert "does not say" not in caplog.text  # there is nothing to know it by


def trained_by_two():
    """A model whose matrix one optimizer trains and whose bias another, and the two."""
    model = nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    return model, [torch.optim.Muon([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=0.1)]


def test_a_step_of_several_optimizers_ends_when_the_last_has_stepped():
    model, optimizers = trained_by_two()
    averager = swaft.WeightAverager(model, optimizers, rule=swaft.SWA(start=0), total_steps=2)
    members = [torch.cat([model.weight.flatten(), model.bias]).detach()]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
            averager.step()  # after the first as after a micro-batch
        members.append(torch.cat([model.weight.flatten(), model.bias]).detach())
    assert (averager.applied_steps, averager.num_averaged) == (2, 3)
    assert torch.allclose(averager.shard(), torch.stack(members).double().mean(0).float(), atol=1e-7)
    assert swaft.WeightAverager(model, optimizers, total_steps=4).applied_steps == 2  # as AdamW's state says


def test_nothing_is_written_past_a_swap_by_any_of_several_optimizers():
    model, optimizers = trained_by_two()
    averager = swaft.WeightAverager(model, optimizers, rule=swaft.SWA(start=0), total_steps=2)
    for optimizer in optimizers:
        with (
            averager.swapped_in(),
            pytest.raises(AveragingError, match="while the averaged weights are swapped in"),
        ):
            optimizer.step()
    averager.step()
    with pytest.raises(AveragingError, match="another SGD"):
        torch.optim.SGD([model.weight], lr=0.1).step()


def test_weights_that_only_the_first_of_several_optimizers_has_changed_so_far_are_no_unseen_step():
    model, (muon, adamw) = trained_by_two()
    averager = swaft.WeightAverager(model, [muon, adamw], rule=swaft.SWA(start=0), total_steps=2)
    muon.step()  # and the other one is skipped, as an overflow of its gradients would make it
    averager.step()
    with averager.swapped_in():
        pass
    assert averager.num_averaged == 1


def test_one_of_several_optimizers_is_refused_and_the_list_named():
    model, (muon, _) = trained_by_two()
    with pytest.raises(LayoutError, match=r"'bias' is trainable but.*\(model, \[muon, adamw\]"):
        attach_engine(model, muon)
    with pytest.raises(UnsupportedEngineError, match="an empty list, expected"):
        attach_engine(model, [])
