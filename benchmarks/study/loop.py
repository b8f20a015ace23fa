"""A compact training loop: AdamW, warmup, gradient clipping, and the averager called after every step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import swaft

WARM_UP = 0.06
WEIGHT_DECAY = 0.01
CLIP = 1.0


@dataclass(frozen=True)
class Trained:
    """What a training returns, besides the model."""

    averager: Any
    """None if nothing was averaged."""
    seed: int
    """Of its dropout masks."""
    steps: int
    seconds: float
    cpu_seconds: float
    """Of all threads of this process."""
    divergence: float
    """Mean over the last half of the steps."""
    noise_to_signal: float
    """The same mean."""


def rate_at(step: int, total_steps: int, schedule: str) -> float:
    """Learning rate of step ``step`` (from 0) of ``total_steps``, as a share of the peak rate."""
    warm_up = max(1, round(WARM_UP * total_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 1.0 if schedule == "constant" else (total_steps - step) / (total_steps - warm_up)


def train(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    objective: Any,
    schedule: str,
    rate: float,
    total_steps: int,
    rules: dict[str, Any],
    precision: str,
    seed: int,
) -> Trained:
    """Train a model in place.

    Args:
        model: on its device.
        batches: one per step.
        objective: one of swaft.noise, or called like them.
        schedule: decayed or constant.
        rate: peak learning rate.
        total_steps: number of batches.
        rules: averaging rules, by name; may be empty.
        precision: of the passes, ``bf16`` (autocast; weights and optimizer are fp32) or ``fp32``.
        seed: of the dropout masks.
    """
    device = next(model.parameters()).device
    objective.prepare_model(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    schedule_of = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(min(step, total_steps - 1), total_steps, schedule)
    )
    averager = (
        swaft.WeightAverager(model, optimizer, rule=rules, total_steps=total_steps, threads=1)
        if rules
        else None
    )
    torch.manual_seed(seed)
    model.train()
    divergences, signals = [], []
    began, cpu_began = time.perf_counter(), time.process_time()
    for batch in batches:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            output = objective(model, batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule_of.step()
        optimizer.zero_grad()
        if averager is not None:
            averager.step()
        divergences.append(output.divergence)
        signals.append(output.noise_to_signal)
    if len(divergences) != total_steps:
        raise ValueError(f"got {len(divergences)} batches for {total_steps} steps; expected one per step")
    if averager is not None:
        averager.wait()
    half = len(divergences) // 2
    return Trained(
        averager=averager,
        seed=seed,
        steps=total_steps,
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu_began,
        divergence=float(torch.stack(divergences[half:]).float().mean()),
        noise_to_signal=float(torch.stack(signals[half:]).float().mean()),
    )
