"""Builds a model under each engine through accelerate, the way a user's script would."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from models import MICRO_BATCH, adamw, tiny_bert
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from swaft.averaging import Engine
from swaft.averaging.export import add_frozen
from swaft.averaging.shards import gather_trained


@dataclass(frozen=True)
class EngineCase:
    """One engine: a ZeRO stage, FSDP2, or neither (DDP; one process alone trains plainly), and a precision."""

    stage: int | None
    precision: str
    zero: dict[str, Any] = field(default_factory=dict)
    """Of DeepSpeed's `zero_optimization`."""
    top: dict[str, Any] = field(default_factory=dict)
    """Of the rest of DeepSpeed's configuration."""
    fused: bool = False
    """Have DeepSpeed take torch's AdamW for its own fused Adam, and with it the wrapper made for that."""
    fsdp: dict[str, Any] | None = None
    """Arguments of `fully_shard`, and how many ranks hold the same shard (HSDP); accelerate itself shards where
    they are `{"by": "accelerate"}`."""

    def deepspeed_config(self, accumulation: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {
                "stage": self.stage,
                **({"stage3_gather_16bit_weights_on_model_save": True} if self.stage == 3 else {}),
                **self.zero,
            },
            "zero_force_ds_cpu_optimizer": False,
            **({"bf16": {"enabled": True}} if self.precision == "bf16" else {}),
            **self.top,
        }


CPU = {"device": "cpu", "pin_memory": False}
# No clipping under round robin: the order of the sum in the gradient norm would differ from the plain order's.
ROUND_ROBIN = {"round_robin_gradients": True}
UNCLIPPED = {"gradient_clipping": 0.0}
ENGINES = {
    "ddp fp32": EngineCase(None, "fp32"),
    "ddp bf16": EngineCase(None, "bf16"),
    "zero0 fp32": EngineCase(0, "fp32"),
    "zero0 bf16": EngineCase(0, "bf16"),
    "zero0 bf16, fused": EngineCase(0, "bf16", fused=True),
    "zero1 fp32": EngineCase(1, "fp32"),
    "zero1 bf16": EngineCase(1, "bf16"),
    "zero1 bf16, fp32 accumulation": EngineCase(1, "bf16", top={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2 fp32": EngineCase(2, "fp32"),
    "zero2 bf16": EngineCase(2, "bf16"),
    "zero2 bf16, round robin": EngineCase(2, "bf16", ROUND_ROBIN, UNCLIPPED),
    "zero2 bf16, round robin, aligned": EngineCase(
        2, "bf16", {**ROUND_ROBIN, "parameter_alignment": True}, UNCLIPPED
    ),
    "zero2 bf16, optimizer offload": EngineCase(2, "bf16", {"offload_optimizer": CPU}),
    "zero3 fp32": EngineCase(3, "fp32"),
    "zero3 bf16": EngineCase(3, "bf16"),
    "zero3 bf16, nothing resident, small sub-groups": EngineCase(
        3, "bf16", {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    ),
    "zero3 bf16, some resident": EngineCase(3, "bf16", {"stage3_param_persistence_threshold": 100}),
    "zero3 bf16, optimizer offload": EngineCase(3, "bf16", {"offload_optimizer": CPU}),
    "zero3 bf16, optimizer and parameter offload": EngineCase(
        3, "bf16", {"offload_optimizer": CPU, "offload_param": CPU}
    ),
    "fsdp2 fp32": EngineCase(None, "fp32", fsdp={}),
    "fsdp2 bf16": EngineCase(None, "bf16", fsdp={}),
    "fsdp2 bf16, root resharded": EngineCase(None, "bf16", fsdp={"reshard_after_forward": True}),
    "fsdp2 fp32, nothing resharded": EngineCase(None, "fp32", fsdp={"reshard_after_forward": False}),
    "fsdp2 bf16, offload": EngineCase(None, "bf16", fsdp={"offload": True}),
    "fsdp2 fp32, replicated": EngineCase(None, "fp32", fsdp={"replicas": 2}),
    "fsdp2 bf16, replicated, offload": EngineCase(None, "bf16", fsdp={"replicas": 2, "offload": True}),
    "fsdp2 fp32, by accelerate": EngineCase(None, "fp32", fsdp={"by": "accelerate"}),
}


def prepared(case: EngineCase, *, accumulation: int = 1, model=None, build_optimizer=adamw):
    """(accelerator, model, optimizer) under the engine, asserted to be what was asked for."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    by_accelerate = case.fsdp == {"by": "accelerate"}
    plugin = None
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left behind by the plugin of an engine before
    if case.stage is not None:
        plugin = DeepSpeedPlugin(hf_ds_config=case.deepspeed_config(accumulation))
    accelerator = Accelerator(
        # FSDP2 casts by a policy of its own; autocast is for what has none.
        mixed_precision="bf16" if case.precision == "bf16" and case.fsdp is None else "no",
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        cpu=case.stage is None and not by_accelerate,
    )
    model = tiny_bert() if model is None else model
    assert accelerator.num_processes == dist.get_world_size()
    if case.fsdp is not None and not by_accelerate:
        model = shard(model, case)
        return accelerator, model, accelerator.prepare_optimizer(build_optimizer(model))
    if case.stage is None and dist.get_world_size() == 1:
        switch_on(accelerator, DistributedType.NO)  # as without a launcher: no DDP of one rank
    if by_accelerate:
        # On a CPU accelerate drops FSDP2 without a word, though its preparation runs there: switched on again.
        switch_on(accelerator, DistributedType.FSDP)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list({type(block).__name__ for block in blocks(model)}),
            cpu_ram_efficient_loading=False,
        )
    taken_for_fused = mock.patch("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
    with taken_for_fused if case.fused else nullcontext():
        model, optimizer = accelerator.prepare(model, build_optimizer(model))
    if case.stage is not None:
        assert accelerator.distributed_type == DistributedType.DEEPSPEED, accelerator.distributed_type
        assert model.zero_optimization_stage() == case.stage
        assert (type(model.optimizer).__name__ == "FP16_Optimizer") == case.fused
    elif not by_accelerate:
        assert isinstance(model, nn.parallel.DistributedDataParallel) == (dist.get_world_size() > 1)
    return accelerator, model, optimizer


def switch_on(accelerator: Accelerator, kind: DistributedType) -> None:
    for state in (PartialState(), accelerator.state):  # the second takes over what is in the first
        state.distributed_type = kind


def shard(model: nn.Module, case: EngineCase) -> nn.Module:
    """`fully_shard` by hand: every block of a list of blocks, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    options = dict(case.fsdp or {})
    offload, ranks = options.pop("offload", False), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    if "replicas" in options:
        replicas = math.gcd(options.pop("replicas"), ranks)
        shape, names = (replicas, ranks // replicas), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    options |= {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if case.precision == "bf16" else None),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
    }
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a stack of; not the parts of one, which T5 keeps in lists, too, nor what torch
    does to a weight.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks = [each for each in lists if not isinstance(each, ParametrizationList)]
    within = {id(part) for stack in stacks for block in stack for part in block.modules()}
    return [block for stack in stacks if id(stack) not in within for block in stack]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP or DeepSpeed's engine."""
    return getattr(model, "module", model)


def full_masters(case: EngineCase, model, optimizer) -> dict[str, torch.Tensor]:
    """Every trainable parameter's whole fp32 master on every rank, by a way that swaft does not use."""
    module = unwrapped(model)
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if case.fsdp is not None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        return {name: whole[name].clone() for name in names}
    if case.stage is None or (case.stage == 0 and case.precision == "fp32"):
        return {name: p.detach().clone() for name, p in names.items()}
    if case.stage == 0:
        wrapper = optimizer.optimizer
        masters = {}
        for g, weights in enumerate(wrapper.fp16_groups):
            numels = [p.numel() for p in weights]
            group = wrapper.fp32_groups_flat[g].split(numels) if case.fused else wrapper.fp32_groups[g]
            masters |= {id(p): m.view(p.shape) for p, m in zip(weights, group, strict=True)}
        return {name: masters[id(p)].detach().clone() for name, p in names.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in names.items()}


def gather_state_dict(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    """The whole model on rank 0's host, trained parameters from shards, in fp32 (collective; {} elsewhere)."""
    return add_frozen(engine, gather_trained(engine, shard))
