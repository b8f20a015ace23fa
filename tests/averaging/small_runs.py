"""Small models in training, each with an averager."""

from __future__ import annotations

import torch
from torch import nn

import swaft


def attached(model, *, rule=None, total_steps=9, build=torch.optim.SGD, lr=0.1, **options):
    """An optimizer of what a model trains, and an averager: by default, of all steps."""
    optimizer = build([p for p in model.parameters() if p.requires_grad], lr=lr)
    rule = rule or swaft.SWA(start=0)
    return optimizer, swaft.WeightAverager(model, optimizer, rule=rule, total_steps=total_steps, **options)


def take_step(model, optimizer, rows=None) -> None:
    """A step on random rows for the first layer, or on those given."""
    rows = torch.randn(8, next(model.parameters()).shape[1]) if rows is None else rows
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def training(rule, *, steps: int = 8, during=None, **options):
    """A model after some steps, its optimizer and averager, and the weights after every step.

    Args:
        rule: of the averager; None for no averager.
        steps: how many, which the averager is told.
        during: called after each step with the model and the averager.
        options: of the averager.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.1), nn.Linear(7, 3))
    optimizer, averager = torch.optim.AdamW(model.parameters(), lr=0.01), None
    if rule is not None:
        averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=steps, **options)
    recorded = [flat(model)]
    for _ in range(steps):
        take_step(model, optimizer)
        if averager:
            averager.step()
        recorded.append(flat(model))
        if during:
            during(model, averager)
    return model, optimizer, averager, recorded


def averaged(model, *, steps: int = 5, rule=None, lr: float = 0.05):
    """The averager of a model after some steps of AdamW on random rows."""
    optimizer, averager = attached(model, rule=rule, total_steps=steps, build=torch.optim.AdamW, lr=lr)
    for _ in range(steps):
        take_step(model, optimizer)
        averager.step()
    return averager


def moved(model, rule=None, *, steps: int = 2):
    """The averager of a model after some steps along random gradients."""
    torch.manual_seed(0)
    optimizer, averager = attached(model, rule=rule, lr=0.3)
    for _ in range(steps):
        for parameter in averager.engine.trainable.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averager.step()
    return averager


def flat(model) -> torch.Tensor:
    """A copy of a model's weights, end to end."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
