"""Runs on every rank: engines and modes refused before training, by a typed error that names the setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from engines import CPU, ENGINES, EngineCase, prepared, shard
from harness import worker_main
from models import adamw, tiny_bert, uneven
from run_on_ranks import raised_on_every_rank
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from swaft.averaging import attach_engine
from swaft.errors import LayoutError, UnsupportedEngineError

Check = tuple[str, Callable[[], None]]


def refused(part: str, model: nn.Module, optimizer) -> None:
    raised_on_every_rank(UnsupportedEngineError, part, lambda: attach_engine(model, optimizer))


def deepspeed_modes() -> Iterator[Check]:
    """Modes that DeepSpeed really starts here."""
    zenflow = {"topk_ratio": 0.1, "update_interval": 2, "select_interval": 2, "select_strategy": "step"}
    zenflow |= {"full_warm_up_rounds": 0, "overlap_step": False}
    masters_16 = {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    }
    modes = {
        "zero_optimization.zenflow": EngineCase(3, "bf16", {"offload_optimizer": CPU, "zenflow": zenflow}),
        "bf16.bf16_master_weights_and_grads": EngineCase(2, "bf16", top=masters_16),
        "or fp16.fp16_master_weights_and_grads": EngineCase(3, "bf16", top=masters_16),
        "zero_optimization.offload_optimizer.device=nvme": EngineCase(
            2, "bf16", {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere", "pin_memory": False}}
        ),
        "zero_optimization.zero_hpz_partition_size > 1": EngineCase(
            3, "bf16", {"zero_hpz_partition_size": 2}
        ),
        "compile.deepcompile": EngineCase(3, "bf16", top={"compile": {"deepcompile": True}}),
    }
    for setting, case in modes.items():

        def started(setting=setting, case=case):
            _, model, optimizer = prepared(case)
            refused(setting, model, optimizer)

        yield setting, started

    def pipeline():
        import deepspeed
        from deepspeed.pipe import PipelineModule

        with mock.patch("deepspeed.utils.groups.mpu", None):  # which it sets for the whole process
            staged = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=2, loss_fn=nn.MSELoss())
            engine = _initialize(deepspeed, staged, torch.optim.AdamW(staged.parameters()))
            refused("pipeline parallelism", engine, engine.optimizer)

    def experts():
        import deepspeed
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as by_expert

        model = nn.Sequential(nn.Linear(4, 4), MoE(4, nn.Linear(4, 4), num_experts=2, ep_size=2))
        groups = by_expert({"params": list(model.parameters()), "name": "all"})
        engine = _initialize(deepspeed, model, torch.optim.AdamW(groups))
        refused("expert parallelism", engine, engine.optimizer)

    def autocast_fp16():
        for stage in (0, 2):
            case = EngineCase(stage, "fp32", top={"torch_autocast": {"enabled": True, "dtype": "float16"}})
            _, model, optimizer = prepared(case)
            refused("torch_autocast in fp16", model, optimizer)

    def tensor_parallel():
        with mock.patch("deepspeed.utils.groups.mpu", None):
            _, model, optimizer = prepared(EngineCase(1, "bf16", top={"tensor_parallel": {"autotp_size": 2}}))
            refused("tensor_parallel.autotp_size", model, optimizer)

    yield "pipeline parallelism", pipeline
    yield "expert parallelism", experts
    yield "tensor parallelism", tensor_parallel
    yield "torch_autocast in fp16", autocast_fp16  # last: it leaves autocast state behind in the process


def _initialize(deepspeed, model: nn.Module, optimizer):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def stand_ins() -> Iterator[Check]:
    """Modes that DeepSpeed starts on other machines only: a real engine that says it is in that mode."""
    _, model, optimizer = prepared(ENGINES["zero3 bf16"])
    for attribute, owner, answer in (
        ("mpu", model, object()),
        ("sub_group_process_groups", model.optimizer, [dist.new_group([0])]),
    ):

        def set_otherwise(attribute=attribute, owner=owner, answer=answer):
            with mock.patch.object(owner, attribute, answer):
                refused("tensor or sequence parallelism", model, optimizer)

        yield f"tensor or sequence parallelism, by {attribute}", set_otherwise

    for setting, poser, name in (
        ("hybrid_engine.enabled", model, "DeepSpeedHybridEngine"),
        ("trains with MiCS_Optimizer", model.optimizer, "MiCS_Optimizer"),
    ):

        def poses(setting=setting, poser=poser, name=name):
            own_class = type(poser)
            poser.__class__ = type(name, (own_class,), {})
            try:
                refused(setting, model, optimizer)
            finally:
                poser.__class__ = own_class

        yield f"{setting}, by its class", poses

    def legacy_fusion():
        _, fused, its_optimizer = prepared(ENGINES["zero0 bf16, fused"])
        with mock.patch.object(fused.optimizer, "fused_adam_legacy", True):
            refused("optimizer.legacy_fusion", fused, its_optimizer)

    yield "optimizer.legacy_fusion", legacy_fusion


def torch_modes() -> Iterator[Check]:
    """Layouts of torch's own that are not one shard of fp32 rows a rank."""
    world_size = dist.get_world_size()

    def bare():
        model = tiny_bert()
        refused("accelerator.prepare", model, adamw(model))

    def fsdp1():
        from torch.distributed.fsdp import FullyShardedDataParallel

        with mock.patch("torch.accelerator.current_accelerator", return_value=None):
            model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
        refused("fsdp_version=2", model, torch.optim.AdamW(model.parameters()))

    def replicas_that_differ():
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicate", "shard"))
        model = uneven().requires_grad_(True)
        with torch.no_grad():
            next(model.parameters()).add_(dist.get_rank())
        model = fully_shard(model, mesh=mesh)
        raised_on_every_rank(LayoutError, "replicas of one", lambda: attach_engine(model, adamw(model)))

    def ddp_over_each_rank_alone():
        alone = [dist.new_group([rank]) for rank in range(world_size)][dist.get_rank()]
        model = uneven().requires_grad_(True)
        model = nn.parallel.DistributedDataParallel(model, process_group=alone)
        with torch.no_grad():
            next(model.parameters()).add_(dist.get_rank())
        raised_on_every_rank(
            LayoutError, "no DDP over a part of the ranks", lambda: attach_engine(model, adamw(model))
        )

    def a_part_of_the_ranks():
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("others", "shard"))["shard"]
        model = fully_shard(uneven().requires_grad_(True), mesh=mesh)
        refused("expected a mesh over all ranks", model, adamw(model))

    def tensor_parallel():
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (world_size,))
        model = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
        refused("tensor parallelism", model, adamw(model))

    def half():
        from torch.distributed.fsdp import fully_shard

        model = uneven()
        fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (world_size,)))
        refused("call `fully_shard` on the whole model", model, adamw(model))

    def by_columns():
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        model = nn.Sequential(nn.Linear(2 * world_size, 3, bias=False))
        fully_shard(
            model, mesh=init_device_mesh("cpu", (world_size,)), shard_placement_fn=lambda parameter: Shard(1)
        )
        refused("shard_placement_fn", model, adamw(model))

    def shards_of_16_bits():
        model = shard(uneven().bfloat16(), ENGINES["fsdp2 fp32"])
        refused("MixedPrecisionPolicy", model, adamw(model))

    def without_masters():
        case = ENGINES["ddp fp32"]
        _, model, optimizer = prepared(case, model=uneven().bfloat16())
        refused("train.mixed_precision=bf16", model, optimizer)

    for check in (
        bare,
        fsdp1,
        tensor_parallel,
        a_part_of_the_ranks,
        replicas_that_differ,
        ddp_over_each_rank_alone,
        half,
        by_columns,
        shards_of_16_bits,
        without_masters,
    ):
        yield check.__name__, check


if __name__ == "__main__":
    worker_main({"torch": torch_modes, "stand-ins": stand_ins, "deepspeed": deepspeed_modes})
