"""Generating models through the objectives on a card, held to logits on the CPU, where noise has the same bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import biased_bart, causal_batch, gemma2, generation_batch, gpt2, t5

import swaft
from swaft.averaging.arithmetic import reference_mean
from swaft.noise import R3F, TaskLoss, passes

MODELS = {
    "t5": (t5, generation_batch),
    "bart with a bias": (biased_bart, generation_batch),
    "gpt2": (gpt2, causal_batch),
    "gemma2 with a soft-cap": (gemma2, causal_batch),
}
OBJECTIVES = {
    "shared masks": {},
    "one-sided": {"detach": "noised"},
    "doubled": {"passes": "doubled"},
    "independent masks": {"masks": "independent"},
    "fairseq": {"preset": "fairseq", "sigma": 0.1},
}


def outcome(objective: Any, model: Any, batch: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    """The loss of a step without dropout, and its gradients on the host."""
    loss = objective(model, batch).loss
    loss.backward()
    return float(loss), [each.grad.cpu() for each in model.parameters() if each.grad is not None]


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: each.to(device) for name, each in batch.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_generating_model_has_the_loss_that_its_logits_on_a_cpu_give(device, name, kind):
    (build, make), options = MODELS[name], {"preset": "relative", "sigma": 0.5} | OBJECTIVES[kind]
    expected, wanted = outcome(R3F(**options, fused=False), build(dropout=0.0), make())
    with mock.patch.object(
        passes, "linear_cross_entropy_symmetric_kl", wraps=passes.linear_cross_entropy_symmetric_kl
    ) as loss:
        found, gradients = outcome(R3F(**options), build(dropout=0.0).to(device), moved(make(), device))
    labels = make()["labels"]
    rows = labels if make is generation_batch else labels[:, 1:]
    counted = labels.numel() if kind == "fairseq" else int((rows != -100).sum())
    assert loss.call_args.kwargs["num_counted"] == counted  # known on the host before the passes are over
    assert found == pytest.approx(expected, rel=1e-5)
    for got, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_a_generating_model_are_the_same_in_both_passes(device, name):
    build, make = MODELS[name]

    def divergence(masks: str) -> float:
        return float(R3F(sigma=1e-6, masks=masks)(build().to(device), moved(make(), device)).divergence)

    assert divergence("shared") < 1e-8
    assert divergence("independent") > 1e-5


@pytest.mark.parametrize("objective", [TaskLoss(), R3F(preset="relative", sigma=0.5)], ids=["plain", "R3F"])
def test_steps_of_a_generating_model_are_averaged(device, objective):
    model, batch = t5().to(device), moved(generation_batch(), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=9)
    members = []
    for _ in range(3):
        objective(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
        members.append(torch.cat([each.detach().cpu().flatten() for each in model.parameters()]))
    expected = reference_mean(members, [1.0, 1 / 2, 1 / 3])
    with averager.swapped_in():
        averaged = torch.cat([each.detach().cpu().flatten() for each in model.parameters()])
    assert torch.equal(averaged, expected)
