"""What averaging has to see of a training: bad weights, skipped steps, two ranks; on a CPU and on a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import faults, start_ranks
from models import batch, tiny_bert

import swaft
from swaft.averaging.arithmetic import reference_mean
from swaft.errors import AveragingError


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten().cpu() for each in model.parameters() if each.requires_grad])


@pytest.mark.parametrize("place", [0, 33_333, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_member_with_one_element_that_is_no_number_stays_out(device, place, value):
    model = torch.nn.Linear(256, 256, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    first = flat(model)
    model.weight.grad = torch.zeros_like(model.weight)
    model.weight.grad.view(-1)[place] = value
    optimizer.step()
    averager.step()
    with pytest.raises(AveragingError, match="after step 1 are not finite"):
        averager.wait()
    assert averager.num_averaged == 1
    assert torch.equal(averager.shard(), first)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_are_no_members(device, fused):
    """A fused optimizer is called on an overflow, too, and skips the step by itself."""
    model = tiny_bert().to(device).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=10)
    members = []
    for step in range(10):
        rows = {name: each.to(device) for name, each in batch(step, 0).items()}
        loss = model(**rows).loss * (torch.inf if step in (0, 4, 5) else 1.0)
        before = flat(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        averager.step()
        if step in (0, 4, 5):
            assert torch.equal(flat(model), before)
        else:
            members.append(flat(model))
    assert averager.applied_steps == len(members) == 7
    expected = reference_mean(members, [1 / (n + 1) for n in range(len(members))])
    assert torch.equal(averager.shard(), expected)


def test_two_ranks_on_one_device_average_what_both_have(device, tmp_path):
    worker = Path(__file__).parents[1] / "distributed" / "one_device_worker.py"
    findings = start_ranks(worker, tmp_path / "found.json", timeout_s=100, cases=[device.type])
    assert not (found := faults(findings, device.type, checks=3)), found
