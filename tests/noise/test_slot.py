from __future__ import annotations

from unittest import mock

import pytest
import torch

from swaft.noise.head import LossSlot
from swaft.noise.passes import SentCount

pytestmark = pytest.mark.unit

MODELS = {
    "nothing": lambda logits: logits,
    "a bias": lambda logits: logits + torch.tensor([0.3, -2.0]),
    "a soft-cap": lambda logits: 0.5 * torch.tanh((logits + 3.0) / 0.5),
    "a scale": lambda logits: logits * 1e-3,
    "a cast": lambda logits: logits.bfloat16().float(),
    "a slice": lambda logits: logits[0],
}


@pytest.mark.parametrize("between", MODELS)
def test_what_happens_to_the_logits_changes_neither_the_loss_nor_its_gradient(between):
    weight = torch.tensor([1.7, -0.3], requires_grad=True)
    slot, inner = LossSlot(), (weight**3).sum()
    left = slot.leave(inner)
    assert left.shape == (1, 1, 1)
    assert left == 0
    loss = slot.arrive(MODELS[between](left))
    assert torch.equal(loss, inner)
    (gradient,) = torch.autograd.grad(loss / 3, weight)
    (expected,) = torch.autograd.grad((weight**3).sum() / 3, weight)
    assert torch.equal(gradient, expected)


def test_the_gradient_arrives_where_the_loss_left():
    weight = torch.ones(2, requires_grad=True)
    slot, order = LossSlot(), []
    left = slot.leave(weight.sum())
    left.register_hook(lambda _: order.append("head"))
    logits = left * 2
    logits.register_hook(lambda _: order.append("model"))
    slot.arrive(logits).backward()
    assert order == ["model", "head"]


def test_a_count_is_read_behind_its_copy_on_the_device_of_the_flags_whichever_is_the_current_one():
    order, device = [], torch.device("cuda:1")
    number = torch.tensor(3)

    def copied(source, non_blocking):
        assert source is number
        assert non_blocking
        order.append("copy")
        return source

    def pinned(*_, device, pin_memory, **__):
        assert pin_memory
        assert device == "cpu"  # where others make theirs a card: torch.set_default_device
        return mock.Mock(copy_=copied)

    event = mock.Mock(record=lambda stream: order.append(stream), synchronize=lambda: order.append("wait"))
    flags = mock.Mock(is_cuda=True, device=device, sum=lambda: number)
    with (
        mock.patch("torch.empty", pinned),
        mock.patch("torch.cuda.Event", return_value=event),
        mock.patch("torch.cuda.current_stream", lambda of=None: f"stream of {of}"),
    ):
        assert SentCount(flags).read() == 3
    assert order == ["copy", "stream of cuda:1", "wait"]


@pytest.mark.parametrize("counted", [[True, False, True], [False, False], [[True, True], [True, False]]])
def test_counted_rows_are_counted(counted):
    rows = torch.tensor(counted)
    assert SentCount(rows).read() == int(rows.sum())
