"""What only a GPU shows: masters on the device, noise drawn there, 16-bit bodies."""

from __future__ import annotations

import pytest
import torch
from engines import tiny_bert

import swaft
from swaft.averaging.host import HostAverage
from swaft.averaging.layout import Fragment, merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = {
        "input_ids": torch.randint(0, 53, (4, 7), generator=generator),
        "labels": torch.randint(0, 3, (4,), generator=generator),
    }
    return {name: tensor.cuda() for name, tensor in rows.items()}


def train(objective, *, autocast: bool, swap_at: int | None = None):
    model = tiny_bert().cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=8)
    torch.cuda.manual_seed(3)
    recorded, outputs = [], []
    for step in range(8):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = objective(model, batch(step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
        outputs.append(out)
        recorded.append([p.detach().cpu().clone() for p in model.parameters() if p.requires_grad])
        if step == swap_at:
            with averager.swapped_in(), torch.no_grad():
                model.eval()
                model(**batch(0))
                model.train()
    return averager, recorded, outputs


@pytest.mark.parametrize("autocast", [False, True])
def test_the_average_of_device_weights_has_the_bits_of_the_host_mean(autocast):
    averager, recorded, _ = train(swaft.TaskLoss(), autocast=autocast)
    mean = HostAverage(merge(Fragment(str(i), 0, p.numel(), i, 0) for i, p in enumerate(recorded[0])))
    for n, weights in enumerate(recorded[1:]):
        mean.add([weight.flatten() for weight in weights], 1 / (n + 1))
    assert torch.equal(averager.shard(), mean.mean)


def test_a_swap_leaves_training_on_the_device_bit_for_bit_as_it_was():
    _, quiet, _ = train(swaft.TaskLoss(), autocast=False)
    _, swapped, _ = train(swaft.TaskLoss(), autocast=False, swap_at=4)
    assert all(torch.equal(a, b) for a, b in zip(quiet[-1], swapped[-1], strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_zero_noise_with_shared_masks_gives_exactly_zero_divergence(autocast):
    _, _, outputs = train(swaft.R3F(sigma=0.0), autocast=autocast)
    assert all(float(out.divergence) == 0.0 for out in outputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_noise_arrives_and_is_measured(autocast):
    _, _, outputs = train(swaft.R3F(preset="relative", sigma=0.1), autocast=autocast)
    assert all(0.03 < float(out.noise_to_signal) < 0.1 for out in outputs)
    assert all(float(out.divergence) > 0 for out in outputs)


def test_attaching_keeps_nothing_on_the_device():
    model = torch.nn.Linear(4096, 4096).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.cuda.memory_allocated()
    swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
    assert torch.cuda.memory_allocated() == before
