"""Loss along the line from one model through another, and over a plane around both.

There are two directions: from the last weights to the averaged ones, and a random one of the same length. In every
tensor, the random direction is drawn from a normal distribution, made orthogonal to the difference between the two
weights, and scaled to its length, as filter normalisation does for every filter (Li et al. 2018, section 4). So
weights that training has hardly moved are hardly moved here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from swaft.errors import ConfigError
from swaft.report.runs import SURFACE
from swaft.storage import write_durably

LINE = tuple(step / 4 for step in range(-4, 9))
"""Positions along the line: 0 is the last weights, 1 the averaged ones."""
ACROSS, UP = LINE[::2], (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Positions in the plane, along the line and along the random direction."""
SEED = 0
"""Seed of the random direction."""


@torch.no_grad()
def loss_surface(model: nn.Module, averaged: nn.Module, loss: Callable[[], float]) -> dict[str, Any]:
    """Return the loss along the line through two models, and over the plane with a random direction.

    Args:
        model: the last weights, in fp32; restored afterwards.
        averaged: the same model with the averaged weights.
        loss: returns the loss of the weights currently in ``model``.

    Returns:
        ``line``: ``position`` and ``loss``, (13,) each. ``plane``: ``across`` (7,), ``up`` (5,), and ``loss``, 5
        lists of 7. Positions are in units of the distance between the two models.

    Raises:
        ConfigError: both models have the same weights.
    """
    pairs = zip(_floats(model), _floats(averaged), strict=True)
    moved = [(here, here.clone(), there) for here, there in pairs if not torch.equal(here, there)]
    if not moved:
        raise ConfigError(
            "the last and the averaged weights are the same bit for bit: there is no line between them"
        )
    generator = torch.Generator().manual_seed(SEED)
    directions = [_direction(there - start, generator) for _, start, there in moved]

    def at(position: float, up: float = 0.0) -> float:
        for (here, start, there), direction in zip(moved, directions, strict=True):
            here.copy_(torch.lerp(start, there, position).add_(direction, alpha=up))
        torch.clear_autocast_cache()  # inside an outer autocast, casts of the weights before would be used
        progress.update()
        return loss()

    with tqdm(total=len(LINE) + len(ACROSS) * (len(UP) - 1), unit="point", disable=None) as progress:
        along = {position: at(position) for position in LINE}
        plane = [[at(position, up) if up else along[position] for position in ACROSS] for up in UP]
    for here, start, _ in moved:
        here.copy_(start)
    torch.clear_autocast_cache()
    return {
        "line": {"position": list(along), "loss": list(along.values())},
        "plane": {"across": list(ACROSS), "up": list(UP), "loss": plane},
    }


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Yield what can be moved: parameters and floating-point statistics."""
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())


def _direction(difference: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor orthogonal to this one and of the same length; zero for a single element."""
    if difference.numel() == 1:
        return torch.zeros_like(difference)
    drawn = torch.randn(difference.shape, generator=generator).to(difference)
    drawn -= difference * ((drawn * difference).sum() / difference.square().sum())
    return drawn * (difference.norm() / drawn.norm())


def write_losses(run: Path, found: Mapping[str, Any], *, rows: int) -> None:
    """Write the result of `loss_surface` on ``rows`` validation rows into a run's folder, for its page."""
    content = {"split": "validation", "rows": rows, "seed": SEED, **found}
    write_durably(run / SURFACE, (json.dumps(content, indent=1) + "\n").encode())
