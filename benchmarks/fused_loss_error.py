"""Error of the divergence and its gradients against float64, from tiny noise to large, in both dtypes.

Only the divergence: in the whole loss the cross entropy's gradient would hide it. Hidden states are standard
normal, and so is the noise on them, times its size; 16-bit hidden states and weights are exact, with fp32 noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fused_loss_oracle import Divergence, symmetric_kl
from benchmarks.fused_loss_rivals import (
    PLAIN,
    Operands,
    Shape,
    forward_backward,
    make_operands,
    plain_divergence,
    swaft_loss,
)
from benchmarks.measuring import significant

NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHAPE = Shape(128, 256, 8192)
QUICK_SHAPE = Shape(16, 32, 500)
IGNORED = -100
BARS = {"torch.float32": 5e-6, "torch.bfloat16": 5e-3}
"""Bound on every error of the difference form, at every noise."""
DIFFERENCE, BLIND, DIRECT = (
    "swaft, difference form",
    "swaft, difference form of rounded operands",
    "swaft, direct form",
)


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Relative errors of every arm, by dtype and noise."""
    shape = QUICK_SHAPE if quick else SHAPE
    return {
        "shape": shape.name,
        "note": (
            "Errors are relative to float64: of the value, and norm by norm of each gradient. A negative value "
            "can be told by an error above 1. The arms with rounded operands see noised_hidden in their own "
            "dtype alone; in bf16 the difference form is given hidden_difference in fp32 as well."
        ),
        f"bars for {DIFFERENCE}": BARS,
        "by dtype": {
            str(dtype): {f"{noise:g}": _at(shape, dtype, noise, device) for noise in NOISES}
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    return [
        (f"{dtype}, noise {noise}: {name}", *(f"{key} {value:.1e}" for key, value in errors.items()))
        for dtype, at in result["by dtype"].items()
        for noise, arms in at.items()
        for name, errors in arms.items()
    ]


def _at(shape: Shape, dtype: torch.dtype, noise: float, device: str) -> dict[str, dict[str, float]]:
    operands = make_operands(shape, dtype=dtype, device=device, noise=noise)
    blind = replace(operands, difference=None)
    exact = operands.difference
    if exact is None:  # fp32 operands are the truth themselves
        exact = operands.hidden.detach().double() - operands.noised_hidden.detach().double()
    truth = symmetric_kl(operands.hidden, exact, operands.weight)
    arms: dict[str, tuple[Callable[[Operands], Tensor], Operands]] = {
        DIFFERENCE: (_swaft("difference"), operands),
        DIRECT: (_swaft("direct"), blind),
        PLAIN: (_plain, blind),
    }
    if operands.difference is not None:
        arms[BLIND] = (_swaft("difference"), blind)
    return {name: _errors(*arm, truth) for name, arm in arms.items()}


def _swaft(form: str) -> Callable[[Operands], Tensor]:
    """The divergence over all rows, none of which counts for the cross entropy."""

    def loss_of(operands: Operands) -> Tensor:
        rows = torch.ones_like(operands.labels, dtype=torch.bool)
        uncounted = replace(operands, labels=torch.full_like(operands.labels, IGNORED))
        return swaft_loss(uncounted, form=form, ignore_index=IGNORED, kl_mask=rows)

    return loss_of


def _plain(operands: Operands) -> Tensor:
    return plain_divergence(
        F.linear(operands.hidden, operands.weight), F.linear(operands.noised_hidden, operands.weight)
    )


def _errors(loss_of: Callable[[Operands], Tensor], operands: Operands, truth: Divergence) -> dict[str, float]:
    loss, gradients = forward_backward(loss_of, operands)
    assert loss is not None
    errors = {"value": abs(loss.double() - truth.value) / truth.value}
    for name, gradient, exact in zip(("d hidden", "d noised", "d weight"), gradients, truth[1:], strict=True):
        errors[name] = (gradient.double() - exact).norm() / exact.norm()
    return {name: significant(error.item()) for name, error in errors.items()}
