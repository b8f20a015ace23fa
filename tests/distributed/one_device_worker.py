"""Two ranks of DDP on one device: each averages half of the weights, and both see the whole average."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from harness import Case, worker_main
from models import batch, tiny_bert
from torch.nn.parallel import DistributedDataParallel

import swaft
from swaft.averaging.arithmetic import reference_mean


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten().cpu() for each in model.parameters() if each.requires_grad])


def checks(device: str) -> Iterator[tuple[str, Case]]:
    """Trains, then yields what has to hold."""
    rank = dist.get_rank()
    bare = tiny_bert().to(device).train()  # both ranks on card 0, where NCCL would refuse them: gloo
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=6)
    members = []
    for step in range(6):
        rows = {name: each.to(device) for name, each in batch(step, rank).items()}
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
        members.append(flat(bare))
    expected = reference_mean(members, [1 / (n + 1) for n in range(len(members))])

    def halves() -> None:
        sizes = [None, None]
        dist.all_gather_object(sizes, averager.shard().numel())
        assert sum(sizes) == expected.numel(), sizes  # type: ignore[arg-type]
        assert min(sizes) > expected.numel() // 3, sizes  # type: ignore[type-var]

    def swapped() -> None:
        with averager.swapped_in():
            assert torch.equal(flat(bare), expected)

    def left() -> None:
        assert torch.equal(flat(bare), members[-1])

    yield "each rank holds a half", halves
    yield "a swap shows the mean of all members on both ranks", swapped
    yield "training weights are as they were", left


if __name__ == "__main__":
    worker_main({device: partial(checks, device) for device in ("cpu", "cuda")})
