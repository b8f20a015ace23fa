"""Runs on every rank: averages inside `accelerator.save_state` and `load_state`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import swaft
from swaft.errors import StateError
from swaft.integrations.accelerate import register_averager

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from engines import ENGINES, prepared
from harness import worker_main
from models import batch
from run_on_ranks import raised_on_every_rank, same_bits

STEPS = 6
TRIED = ("ddp fp32", "zero2 bf16", "zero3 fp32", "fsdp2 fp32, by accelerate")


class Decay:
    """A schedule with state; torch's own do not take DeepSpeed's optimizers."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def two_groups(model) -> torch.optim.AdamW:
    """Neither is empty: torch 2.13 leaves an empty one without its settings when it loads FSDP2's optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2)


def trained(engine: str, steps: range, state: Path, *, resume: bool = False, save_at: int = 0):
    """The averager after these steps of a run with accumulation and a scheduler, resumed from a folder or not."""
    accelerator, model, optimizer = prepared(ENGINES[engine], accumulation=2, build_optimizer=two_groups)
    scheduler = Decay(optimizer)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=STEPS)
    accelerator.register_for_checkpointing(scheduler)
    register_averager(accelerator, averager)
    if resume:
        accelerator.load_state(str(state))
        assert scheduler.steps == 4
    model.train()
    for step in steps:
        for part in range(2):
            torch.manual_seed(100 * step + 10 * part + dist.get_rank())
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch(2 * step + part, dist.get_rank())).loss)
                optimizer.step()
                optimizer.zero_grad()
            averager.step()
        scheduler.step()
        if step + 1 == save_at:
            accelerator.save_state(str(state))
            accelerator.save_state(str(state))  # over what is there, as accelerate does
    return accelerator, averager


def case(engine: str):
    def checks():
        names = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(names)
        state = Path(names[0]) / "state"

        def resumes():
            _, whole = trained(engine, range(STEPS), state, save_at=4)
            _, resumed = trained(engine, range(4, STEPS), state, resume=True)
            assert resumed.num_averaged == whole.num_averaged == 5
            assert same_bits(resumed.shard(), whole.shard())
            assert same_bits(resumed.engine.live_shard(), whole.engine.live_shard())

        yield "save_state and load_state carry the averages", resumes

        def says_what_is_missing():
            accelerator, _ = trained(engine, range(0), state)
            if dist.get_rank() == 0:
                (state / "averages").rename(state.with_name("elsewhere"))
            dist.barrier()
            raised_on_every_rank(StateError, "averages", lambda: accelerator.load_state(str(state)))

        yield "a folder without them is refused", says_what_is_missing

    return checks


if __name__ == "__main__":
    worker_main({engine: case(engine) for engine in TRIED})
