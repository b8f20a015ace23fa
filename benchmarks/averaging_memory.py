"""Host memory of an average, per element: what swaft accounts for, and what the process has grown by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import psutil
import torch

import swaft

PRECISIONS: tuple[Literal["compensated", "plain"], ...] = ("compensated", "plain")


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Bytes per owned element in both forms, and pinned bytes."""
    rows, columns = (64, 64) if quick else (8192, 4096)
    _grown("compensated", 64, 64, device)  # compiled code and thread stacks are not part of an average
    return {
        "elements": rows * columns,
        "by precision": {each: _grown(each, rows, columns, device) for each in PRECISIONS},
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    return [
        (
            f"{precision}: bytes an element",
            f"accounted {figures['accounted bytes an element']:.3f}",
            f"grown {figures['grown bytes an element']:.3f}",
            f"pinned {figures['pinned bytes']}",
        )
        for precision, figures in result["by precision"].items()
    ]


def _grown(
    precision: Literal["compensated", "plain"], rows: int, columns: int, device: str
) -> dict[str, object]:
    """Attach to a model of one matrix, average three members, and measure the memory held."""
    weight = torch.nn.Linear(columns, rows, bias=False, device=device)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    weight.weight.grad = torch.ones_like(weight.weight)
    optimizer.step()
    process = psutil.Process()
    before = process.memory_info().rss
    averager = swaft.WeightAverager(
        weight, optimizer, rule=swaft.SWA(start=0), total_steps=100, precision=precision
    )
    for _ in range(2):
        optimizer.step()
        averager.step()
    averager.wait()
    held = process.memory_info().rss - before
    forecast = averager.forecast()
    averager.close()
    numel = rows * columns
    return {
        "accounted bytes an element": forecast.host_bytes / numel,
        "grown bytes an element": (held - forecast.pinned_bytes) / numel,
        "pinned bytes": forecast.pinned_bytes,
    }
