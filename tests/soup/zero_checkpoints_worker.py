"""Trains on every rank under each engine; what is read and averaged of DeepSpeed's checkpoint is our export."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from engines import ENGINES, prepared
from models import batch
from safetensors.torch import load_file

import swaft
from swaft.averaging import export
from swaft.soup import average, open_checkpoint

MODES = (
    "zero1 bf16",
    "zero1 bf16, fp32 accumulation",
    "zero2 bf16, round robin, aligned",
    "zero3 bf16, nothing resident, small sub-groups",
)


def compare(checkpoint: Path, exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    with open_checkpoint(checkpoint, trust_pickle=True) as found:
        assert found.specs.keys() == weights.keys(), found.specs.keys() ^ weights.keys()
        for name, spec in found.specs.items():
            assert spec.shape == tuple(weights[name].shape), name
            assert torch.equal(found.read(name, 0, spec.numel).float(), weights[name].flatten().float()), name
    written = checkpoint.with_name(f"{checkpoint.name}-averaged")
    average([checkpoint], written, base=exported, trust_pickle=True)
    averaged = load_file(written / "model.safetensors")
    assert averaged.keys() == weights.keys()
    assert all(torch.equal(averaged[name], weights[name]) for name in weights)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for number, mode in enumerate(MODES):
        torch.manual_seed(0)
        accelerator, model, optimizer = prepared(ENGINES[mode])
        averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
        for step in range(2):
            accelerator.backward(model(**batch(step, dist.get_rank())).loss)
            optimizer.step()
            optimizer.zero_grad()
            averager.step()
        averager.wait()
        model.save_checkpoint(str(folder / f"checkpoint-{number}"))
        export.save_pretrained(averager.engine, folder / f"exported-{number}")
        averager.close()
        dist.barrier()
        if dist.get_rank() == 0:
            compare(folder / f"checkpoint-{number}", folder / f"exported-{number}")
            print(f"{mode}: equal", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
