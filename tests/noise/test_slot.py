from __future__ import annotations

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


@pytest.mark.parametrize("counted", [[True, False, True], [False, False], [[True, True], [True, False]]])
def test_counted_rows_are_counted(counted):
    rows = torch.tensor(counted)
    assert SentCount(rows).read() == int(rows.sum())
