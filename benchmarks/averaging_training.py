"""Shared by the measurements of an averaging event: a rule with a switch, other libraries' averages, clocks."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import BertConfig, BertForSequenceClassification

import swaft
from benchmarks.measuring import spread
from swaft.averaging.rules.base import SettledPlan, one_mean

SWAFT, STEP = "swaft", "training step"
DECAY = 0.9999
Call = Callable[[], Any]


@dataclass
class Switch:
    """Whether the steps that happen now are averaged; at first it is on, for the weights before training."""

    on: bool = True


@dataclass(frozen=True, kw_only=True)
class SwitchedPlan(SettledPlan):
    """A uniform mean of the steps that happen while the switch is on."""

    switch: Switch

    def takes(self, step: int) -> bool:
        """Return the state of the switch, whatever the step."""
        return self.switch.on


@dataclass(frozen=True)
class SwitchedSWA:
    """SWA that can be switched off and on between steps, so that both kinds of step come from one run."""

    switch: Switch = field(default_factory=Switch, repr=False)

    def plan(self, total_steps: int) -> SwitchedPlan:
        """The events of a run."""
        moves = one_mean(lambda n: 1.0 / (n + 1))
        return SwitchedPlan(first_step=0, every=1, total_steps=total_steps, moves=moves, switch=self.switch)


def bert(sizes: dict[str, Any]) -> Any:
    """A BERT classifier on the host, the same at every call, in training."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**sizes)).train()


@dataclass
class Training:
    """A model in training, and its averager."""

    step: Call
    """Forward, backward, optimizer step."""
    averager: swaft.WeightAverager
    switch: Switch
    finish: Call = lambda: None
    """Returns once the device has done what the training thread gave it."""

    def event(self) -> None:
        """Average the step that has just happened, and wait until the average holds it."""
        self.switch.on = True
        self.averager.step()
        self.averager.wait()
        self.switch.on = False


@dataclass
class Other:
    """Another library's average of the same model."""

    update: Call
    """One event, blocking as it is there."""
    nbytes: int
    """Memory it holds, where the weights are unless stated otherwise."""


def torch_average(live: nn.Module, *, multi_avg_fn: Callable | None = None) -> Other:
    """`AveragedModel` as torch ships it: a copy of the whole model on every rank."""
    averaged = AveragedModel(live, multi_avg_fn=multi_avg_fn)
    return Other(lambda: averaged.update_parameters(live), _nbytes(averaged.parameters()))


def timm_average(live: nn.Module) -> Other:
    """What timm's ModelEmaV3 does with fp32 copies: one foreach lerp over the whole model, on every rank."""
    average = [parameter.detach().float().clone() for parameter in live.parameters()]

    @torch.no_grad()
    def update() -> None:
        weights = [parameter.detach().float() for parameter in live.parameters()]
        torch._foreach_lerp_(average, weights, weight=1.0 - DECAY)  # pyright: ignore

    return Other(update, _nbytes(average))


def event_rounds(
    training: Training, others: dict[str, Other], *, rounds: int, together: Call
) -> dict[str, list[float]]:
    """Seconds of a training step and of every event after it, in rounds of random order.

    Here swaft's event runs alone, from `step` until `wait` returns; `paired_blocks` has it behind the next step.

    Args:
        training: see there.
        others: other averages by name.
        rounds: rounds to measure, after one that warms up.
        together: called before each measurement: a barrier, if there are ranks.
    """
    arms = {SWAFT: training.event, **{name: other.update for name, other in others.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in (STEP, *arms)}
    order = random.Random(0)
    for _ in range(1 + rounds):
        for name in (STEP, *order.sample(list(arms), len(arms))):
            together()
            training.finish()
            begun = time.perf_counter()
            training.step() if name == STEP else arms[name]()
            training.finish()
            seconds[name].append(time.perf_counter() - begun)
    return {name: values[1:] for name, values in seconds.items()}


@dataclass
class Blocks:
    """Seconds of blocks of steps on one rank, and what their events cost the training thread."""

    steps: int
    """Steps timed in each block, after one more that separates it from the block before."""
    averaged: list[float]
    """Seconds per step, by pair, with every step averaged."""
    bare: list[float]
    """Seconds per step, by pair, with none averaged."""
    blocking: list[float]
    """Seconds per event that the training thread spent in `step` or waiting before the optimizer, by pair."""
    waits: float
    """Waits per event, as counted by the averager."""


def paired_blocks(training: Training, *, pairs: int, steps: int) -> Blocks:
    """Blocks of averaged and of bare steps, a pair at a time, in random order."""
    averager, order = training.averager, random.Random(1)
    blocks = Blocks(steps, [], [], [], 0.0)
    waits = 0
    for _ in range(pairs):
        for averaged in order.sample((True, False), 2):
            training.switch.on = averaged
            training.step()
            averager.step()
            training.finish()
            standing = 0.0
            count_before, begun = averager.waits.count, time.perf_counter()
            for _ in range(steps):
                waited = averager.waits.seconds
                training.step()
                standing += averager.waits.seconds - waited
                submitted = time.perf_counter()
                averager.step()
                standing += time.perf_counter() - submitted
            training.finish()
            each = (time.perf_counter() - begun) / steps
            if averaged:
                blocks.averaged.append(each)
                blocks.blocking.append(standing / steps)
                waits += averager.waits.count - count_before
            else:
                blocks.bare.append(each)
    training.switch.on = False
    averager.wait()
    blocks.waits = waits / (pairs * steps)
    return blocks


def ratio_of(blocks: Blocks) -> dict[str, object]:
    """Step time with averaging over step time without it, by pair; and the same ratio between bare blocks."""
    ratios = [a / b for a, b in zip(blocks.averaged, blocks.bare, strict=True)]
    noise = [later / earlier for earlier, later in zip(blocks.bare, blocks.bare[1:], strict=False)]
    mean, error = statistics.mean(ratios), None
    if len(ratios) > 1:
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {
        "steps of a block": blocks.steps,
        "averaged / bare": {**spread(ratios), "mean": mean, "standard error": error},
        "bare / bare before it": spread(noise) if noise else None,
        "seconds a bare step": spread(blocks.bare),
    }


def times_of(
    seconds: Sequence[float], *, step_s: float, blocking: Sequence[float] | None = None
) -> dict[str, object]:
    """The times of one average's events, and their share of a training step.

    Args:
        seconds: of an event, until the average holds the member.
        step_s: seconds of a training step.
        blocking: seconds per event that the training thread was blocked; None: all of it.
    """
    standing = seconds if blocking is None else blocking
    return {
        "total s": spread(seconds),
        "blocking s": spread(standing),
        "total / step": statistics.median(seconds) / step_s,
        "blocking / step": statistics.median(standing) / step_s,
    }


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)
