"""What goes wrong on a GPU alone, shown by stand-ins for what it does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from small_runs import attached
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swaft.averaging import Engine
from swaft.averaging.layout import Fragment
from swaft.errors import AveragingError, LayoutError

pytestmark = pytest.mark.unit


class Cast(Engine):
    """Masters in fp32 beside working weights in bf16, as under DeepSpeed."""

    def __init__(self, numel: int):
        model = nn.Linear(numel, 1, bias=False).bfloat16()
        super().__init__("cast", model, [torch.optim.SGD(model.parameters(), lr=0.1)], lambda: 0)
        self.master = model.weight.detach().float().view(-1)
        self.fragments = [Fragment("weight", 0, numel, 0, 0)]

    def masters(self):
        return [self.master]

    def working(self):
        return [self.module.weight.detach().view(-1)]

    def publish(self):
        pass


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made, views apart."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.fixture
def small_pieces():
    with mock.patch("swaft.averaging.engines.base.PIECE", 64):
        yield


@pytest.mark.usefixtures("small_pieces")
def test_a_layout_is_proved_in_pieces_and_the_element_that_is_wrong_is_named():
    engine = Cast(1000)
    with Largest() as largest:
        engine.prove_layout()
    assert 0 < largest.numel <= 64
    engine.master[777] += 1
    with pytest.raises(LayoutError, match="element 777 of 'weight'"):
        engine.prove_layout()


@pytest.mark.usefixtures("small_pieces")
def test_weights_are_cast_and_summed_in_pieces():
    engine = Cast(1000)
    engine.master += 1
    with Largest() as largest:
        engine.write(None)
        engine.sum_of_working()
    assert 0 < largest.numel <= 64
    assert engine.misplaced() is None


def averaged():
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer, averager = attached(model)
    model(torch.ones(2, 8)).square().mean().backward()
    return model, optimizer, averager


def test_a_step_that_a_cuda_graph_captures_is_refused():
    _, optimizer, _averager = averaged()
    with (
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(AveragingError, match="captured in a CUDA graph"),
    ):
        optimizer.step()


def test_steps_that_no_hook_sees_are_noticed_though_the_average_has_its_first_member(tmp_path):
    """As of a graph that was captured before the averager was attached."""
    model, _, averager = averaged()
    with averager.swapped_in():
        pass
    with torch.no_grad():
        model.weight.sub_(model.weight.grad)
    averager.step()
    for call in (
        averager.swapped_in().__enter__,
        lambda: averager.save_pretrained(tmp_path / "average"),
        lambda: averager.save_state(tmp_path / "state"),
    ):
        with pytest.raises(AveragingError, match=r"no optimizer step was seen.*replayed CUDA graph"):
            call()


def test_weights_that_change_after_a_step_was_seen_or_a_state_loaded_are_no_unseen_step(tmp_path):
    model, optimizer, averager = averaged()
    averager.save_state(tmp_path / "state")
    optimizer.step()
    averager.step()
    with averager.swapped_in():
        pass
    again, _, resumed = averaged()
    resumed.load_state(tmp_path / "state")
    with torch.no_grad():
        again.weight.add_(1)
    with resumed.swapped_in():
        pass
    assert not torch.equal(model.weight, again.weight)


def test_the_device_is_waited_for_before_and_after_weights_are_written():
    """Before, FSDP2 and ZeRO-3 may still copy from pinned memory; after, ZeRO-3 gathers on a stream of its own."""
    model, optimizer, averager = averaged()
    optimizer.step()
    averager.step()
    live, seen = model.weight.detach().clone(), []
    with (
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch("torch.cuda.synchronize", side_effect=lambda: seen.append(model.weight.detach().clone())),
        averager.swapped_in(),
    ):
        average = model.weight.detach().clone()
    for waited, weights in zip(seen, (live, average, average, live), strict=True):
        assert torch.equal(waited, weights)
    assert torch.equal(model.weight, live)
    assert not torch.equal(average, live)
