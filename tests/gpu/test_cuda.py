"""What only a GPU shows of averaging: its memory, its threads beside the device, a host that waits for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import batch, tiny_bert
from tiny_models import causal_batch, generation_batch, gpt2, t5
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import swaft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def big_layer(numel: int = 1 << 22):
    model = torch.nn.Linear(numel >> 11, 1 << 11, bias=False).cuda()
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def test_averaging_keeps_nothing_on_the_device():
    model, optimizer = big_layer()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=9)
    for _ in range(4):
        optimizer.step()
        averager.step()
    averager.wait()
    assert torch.cuda.memory_allocated() - before <= 1 << 16  # the norms of the finite check
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20


def test_the_ring_is_pinned():
    model, optimizer = big_layer()
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    averager.wait()
    staged = averager._averages._staged
    assert staged is not None
    assert all(block.is_pinned() for block in staged._blocks)
    assert averager.forecast().pinned_bytes == sum(block.nbytes for block in staged._blocks)


def test_the_training_thread_does_not_wait_for_a_copy():
    model, optimizer = big_layer(1 << 26)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
    averager.wait()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    averager.step()
    submitting = time.perf_counter() - begun
    begun = time.perf_counter()
    averager.wait()
    assert submitting < 0.2 * (time.perf_counter() - begun)


@pytest.mark.parametrize(
    "objective", [swaft.TaskLoss(), swaft.R3F(preset="relative", sigma=0.5)], ids=["plain", "R3F"]
)
@pytest.mark.parametrize(("build", "make"), [(t5, generation_batch), (gpt2, causal_batch)])
def test_the_host_waits_for_nothing_in_a_step(build, make, objective):
    model, rows = build().cuda(), {name: tensor.cuda() for name, tensor in make().items()}
    model.set_attn_implementation("eager")
    if make is generation_batch:
        del rows[
            "attention_mask"
        ]  # of which transformers reads whether it is full (tests/noise/test_no_reads.py)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=9)

    def step() -> None:
        objective(model, rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averager.step()

    step()  # proves the loss, and compiles kernels
    averager.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    averager.wait()
    assert averager.num_averaged == 2


@pytest.fixture
def ranks_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("ranks_of_one")
def test_masks_are_shared_where_fsdp2_keeps_the_weights_on_the_host():
    model = tiny_bert()
    fully_shard(model, offload_policy=CPUOffloadPolicy())

    rows = {name: each.cuda() for name, each in batch(0, 0).items()}

    def divergence(masks: str) -> float:
        return float(swaft.R3F(sigma=1e-6, masks=masks)(model.train(), rows).divergence)

    assert divergence("shared") < 1e-8
    assert divergence("independent") > 1e-6


SECOND_CARD = """
import torch, swaft
model = torch.nn.Linear(512, 512, bias=False, device="cuda:1")
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
for value in (1.0, 2.0, 3.0):
    model.weight.grad = model.weight.detach() - value  # lands on the value
    optimizer.step()
    averager.step()
averager.wait()
assert averager.num_averaged == 4
with averager.swapped_in():
    assert model.weight.device.index == 1
assert not torch._C._cuda_hasPrimaryContext(0), "half a gigabyte was taken on card 0"
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card here; a second is needed")
def test_weights_on_the_second_card_are_averaged_without_touching_the_first():
    root = str(Path(swaft.__file__).parents[1])
    subprocess.run([sys.executable, "-c", SECOND_CARD], check=True, env=os.environ | {"PYTHONPATH": root})
