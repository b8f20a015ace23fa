"""A loss computed inside a model's head, brought out through the slot that the logits leave by.

Engines watch the outputs of modules: ZeRO-3 and FSDP2 fetch a layer's weight in the backward pass when the
gradient of its output arrives. A loss computed in the head has to leave as the head's output, therefore, or its
gradient would find the weight partitioned. What the model does to that output on the way (adding a bias, a
soft-cap, a scale, a cast) must not touch the loss. So only the order of the backward pass goes this way; the
value, and the gradient that comes back, travel beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel.distributed import _DDPSink

from swaft.errors import NoiseError


class LossSlot:
    """Carries one loss: ``leave`` inside the head, ``arrive`` where the model has returned."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._gradient: Tensor | None = None

    def leave(self, loss: Tensor) -> Tensor:
        """Give what the head returns in place of its logits, (1, 1, 1): the number 0, which has a gradient.

        Args:
            loss: 0-dim.
        """
        self._loss = loss
        return _Leave.apply(loss, self)  # type: ignore[no-any-return]

    def arrive(self, logits: Tensor) -> Tensor:
        """Take the loss out again.

        Args:
            logits: what the model has made of the head's output.

        Returns:
            The loss, 0-dim, differentiable where it was.

        Raises:
            NoiseError: for a model that cuts the gradient after its head, or trains weights there, which would
                get none.
        """
        loss, self._loss = self._loss, None
        assert loss is not None, "no loss has left the head"
        if loss.requires_grad:
            _refuse_cut_or_trained_path(logits)
        return _Arrive.apply(logits, loss.detach(), self)  # type: ignore[no-any-return]


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, slot: LossSlot) -> Tensor:
        ctx.slot = slot
        return loss.new_zeros(1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *_grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.slot._gradient, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, slot: LossSlot) -> Tensor:
        ctx.slot = slot
        ctx.save_for_backward(logits)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slot._gradient = grad_outputs[0]
        return torch.zeros_like(ctx.saved_tensors[0]), None, None


def _refuse_cut_or_trained_path(logits: Tensor) -> None:
    """Walk the few nodes between the model's output and its head; a leaf among them is a trained weight."""
    waiting: list[tuple[Any, int]] = [(logits.grad_fn, logits.output_nr)]
    seen, leaves, connected = set(), [], False
    while waiting:
        node, position = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _DDPSink._backward_cls):  # type: ignore[attr-defined]
            waiting.append(node.next_functions[position])  # it hands on all outputs, each in its place
            continue
        if isinstance(node, _Leave._backward_cls):  # type: ignore[attr-defined]
            connected = True
            continue
        weight = getattr(node, "variable", None)  # of the node that accumulates a leaf's gradient
        if weight is not None:
            leaves.append(tuple(weight.shape))
        waiting.extend(node.next_functions)
    if leaves or not connected:
        found = f"applies a trainable weight of shape {leaves[0]} to" if leaves else "cuts the gradient of"
        raise NoiseError(
            f"The model {found} its logits, after its head; expected the head to be the last to train. "
            "Set fused=False, which computes the loss from the logits of both passes."
        )
