"""Averaging and the noise of an encoder's step: on a CPU, where their logic is tried, and on a card."""

from __future__ import annotations

import pytest
import torch
from models import tiny_bert

import swaft
from swaft.averaging import host
from swaft.averaging.arithmetic import reference_mean
from swaft.averaging.host.source import MIN_BLOCK_NUMEL
from swaft.noise.passes import random_state_kept


def batch(step: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = {
        "input_ids": torch.randint(0, 53, (4, 7), generator=generator),
        "labels": torch.randint(0, 3, (4,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in rows.items()}


def train(objective, device, *, autocast: bool, swap_at: int | None = None):
    model = tiny_bert().to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=8)
    torch.manual_seed(3)
    recorded, outputs = [], []
    for step in range(8):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = objective(model, batch(step, device))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
        outputs.append(out)
        recorded.append([p.detach().cpu().clone() for p in model.parameters() if p.requires_grad])
        if step == swap_at:
            with averager.swapped_in(), torch.no_grad():
                model.eval()
                model(**batch(0, device))
                model.train()
    return averager, recorded, outputs


@pytest.mark.parametrize("autocast", [False, True])
def test_the_average_of_device_weights_has_the_bits_of_the_host_mean(device, autocast):
    averager, recorded, _ = train(swaft.TaskLoss(), device, autocast=autocast)
    members = [torch.cat([weight.flatten() for weight in weights]) for weights in recorded[1:]]
    expected = reference_mean(members, [1 / (n + 1) for n in range(len(members))])
    assert torch.equal(averager.shard(), expected)


def test_a_swap_leaves_training_on_the_device_bit_for_bit_as_it_was(device):
    _, quiet, _ = train(swaft.TaskLoss(), device, autocast=False)
    _, swapped, _ = train(swaft.TaskLoss(), device, autocast=False, swap_at=4)
    assert all(torch.equal(a, b) for a, b in zip(quiet[-1], swapped[-1], strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_two_passes_with_shared_masks_and_no_noise_are_the_same_to_the_bit(device, autocast):
    model, rows = tiny_bert().to(device).train(), batch(0, device)

    def logits() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast), torch.no_grad():
            return model(**rows).logits

    with random_state_kept(model, rows):
        first = logits()
    assert torch.equal(logits(), first)
    assert not torch.equal(logits(), first)


@pytest.mark.parametrize("autocast", [False, True])
def test_noise_arrives_and_is_measured(device, autocast):
    _, _, outputs = train(swaft.R3F(preset="relative", sigma=0.1), device, autocast=autocast)
    assert all(0.03 < float(out.noise_to_signal) < 0.1 for out in outputs)
    assert all(float(out.divergence) > 0 for out in outputs)


@pytest.mark.parametrize("ring_bytes", [1 << 29, 8 * 4 * MIN_BLOCK_NUMEL])
def test_a_member_is_whole_though_the_optimizer_writes_over_it_at_once(device, ring_bytes, monkeypatch):
    """Each step overwrites all weights with one number, while the copy of the last is still under way."""
    monkeypatch.setattr(host, "STAGING_BYTES", ring_bytes)
    model = torch.nn.Linear(1 << 11, 1 << 11, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=20)
    members = []
    for step in range(20):
        model.weight.grad = model.weight.detach() - float(step * step)  # SGD at rate 1 lands on step²
        optimizer.step()
        averager.step()
        members.append(torch.full((4,), float(step * step)))
    expected = reference_mean(members, [1 / (n + 1) for n in range(20)])[0]
    assert bool((averager.shard() == expected).all())
