"""Trains on every rank under DDP and FSDP2, and leaves checkpoints as a run does, and the live weights of each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_run_checkpoints import Net, stored, take_step, write_checkpoint

from swaft.distributed import Ranks

STEPS = 3


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks()
    for engine in ("ddp", "fsdp2"):
        net = Net(0)
        if engine == "ddp":
            model = DistributedDataParallel(net)
        else:
            fully_shard(net.hidden, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            model = fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for step in range(1, STEPS + 1):
            take_step(model, optimizer, ranks.world_size * step + ranks.rank)
            write_checkpoint(folder / engine, step, net, optimizer, ranks=ranks)
            live = {name: whole(tensor) for name, tensor in stored(net).items()}
            if ranks.is_main:
                save_file(live, folder / f"{engine}-{step}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
