"""Runs on every rank: generating with weights that FSDP2 has cut, against the whole model."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import T5Config, T5ForConditionalGeneration

from swaft.training.evaluation.generation import generate_tokens

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from harness import worker_main


def whole_model() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def cut_model() -> Any:
    model, mesh = whole_model(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [*model.encoder.block, *model.decoder.block]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def as_prepared_by(engine: DistributedType) -> Any:
    """What is asked of an accelerator, which would drop FSDP2 on a CPU."""
    return SimpleNamespace(
        unwrap_model=lambda model: model,
        distributed_type=engine,
        num_processes=dist.get_world_size(),
        state=SimpleNamespace(deepspeed_plugin=None),
        autocast=nullcontext,
    )


def fsdp2_case():
    whole, cut = whole_model(), cut_model()
    generator = torch.Generator().manual_seed(dist.get_rank())
    batch = {
        "input_ids": torch.randint(2, 40, (3, 6), generator=generator),
        "attention_mask": torch.ones(3, 6, dtype=torch.int64),
    }
    for beams in (1, 2):

        def check(beams=beams):
            # One rank is done long before the other, and has to go on for its sake.
            settings = {"max_new_tokens": 3 + 5 * dist.get_rank(), "num_beams": beams}
            with torch.no_grad():
                expected = generate_tokens(whole, batch, as_prepared_by(DistributedType.MULTI_GPU), settings)
                found = generate_tokens(cut, batch, as_prepared_by(DistributedType.FSDP), settings)
            assert torch.equal(found, expected)

        yield f"{beams} beams: the same tokens", check

    def check_training():
        cut.train()
        cut(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in cut.parameters())

    yield "training goes on", check_training


if __name__ == "__main__":
    worker_main({"fsdp2": fsdp2_case})
