"""Finds the adapter for a model and optimizer, or refuses with the setting that is in the way.

The choice looks at the objects, never at a configured stage number: stage 1 alone has two wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.averaging.engines.base import Engine, clean_name, require_fp32, unknown_parameter
from swaft.averaging.engines.deepspeed_modes import DEEPSPEED_CALLS, deepspeed_steps, refuse_modes
from swaft.averaging.engines.replicated import ReplicatedEngine
from swaft.averaging.engines.steps import StepCounter
from swaft.errors import AveragingError, LayoutError, UnsupportedEngineError


def attach_engine(model: nn.Module, optimizer: Any) -> Engine:
    """The adapter for what `accelerator.prepare` returned (collective).

    Args:
        model: a plain module, a DistributedDataParallel one, one sharded by FSDP2, or a DeepSpeed engine.
        optimizer: its optimizer, wrapped by accelerate or not.

    Raises:
        UnsupportedEngineError: an engine or mode whose fp32 masters cannot be averaged faithfully.
        LayoutError: the masters are not where the adapter expects them, or a trainable parameter is in no
            optimizer group.
        AveragingError: nothing to average.
    """
    if _is_a(optimizer, "AcceleratedOptimizer"):
        optimizer = optimizer.optimizer
    engine = _attach_deepspeed(model) if _is_a(model, "DeepSpeedEngine") else _attach_torch(model, optimizer)
    # DeepSpeed takes one optimizer step with zero gradients when it wraps a 16-bit model at stage 0: weight
    # decay has moved the masters, and the weights are no cast of them until the first real step.
    if engine.name != "deepspeed-zero0" or engine.masters_are_working() or engine.applied_steps() > 0:
        engine.prove_layout()
    if not engine.ranks.sum([engine.numel])[0]:
        raise AveragingError("the model has no trainable parameter; expected at least one to average")
    return engine


def _attach_torch(model: nn.Module, optimizer: Any) -> Engine:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedEngineError(
            f"the optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer; pass model and "
            "optimizer as `accelerator.prepare` returned them"
        )
    module, wrapped = _unwrap(model)
    parts = {cls.__name__ for part in module.modules() for cls in type(part).__mro__}
    if "FullyShardedDataParallel" in parts:
        raise UnsupportedEngineError(
            "the model is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters this version does not "
            "average; use FSDP2: `fully_shard` (accelerate: fsdp_version=2)"
        )
    if "FSDPModule" in parts:
        return _attach_fsdp2(module, optimizer)
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        raise UnsupportedEngineError(
            "the parameters are DTensors, but not by `fully_shard`: tensor parallelism, which this version does "
            "not average; train with FSDP2 alone"
        )
    if not wrapped and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedEngineError(
            f"{dist.get_world_size()} ranks train, but the model is a bare {type(model).__name__}; expected what "
            "`accelerator.prepare` returns: attach after it"
        )
    return ReplicatedEngine(
        "ddp" if wrapped else "plain",
        module,
        optimizer,
        parameters=_optimized_fp32(module, optimizer),
        steps_seen=StepCounter(optimizer),
    )


def _attach_fsdp2(module: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    from swaft.averaging.engines.fsdp2 import FSDP2Engine, refuse_layout, reshard

    reshard(module)
    parameters = _optimized(module, optimizer)
    for name, parameter in parameters.items():
        refuse_layout(name, parameter)
    return FSDP2Engine(
        module, optimizer, parameters=list(parameters.values()), steps_seen=StepCounter(optimizer)
    )


def _attach_deepspeed(deepspeed_engine: Any) -> Engine:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from swaft.averaging.engines.zero import Zero3Engine, Zero12Engine

    refuse_modes(deepspeed_engine)
    wrapper = deepspeed_engine.optimizer
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3Engine(deepspeed_engine)
    if type(wrapper) is DeepSpeedZeroOptimizer:
        return Zero12Engine(deepspeed_engine)
    if type(wrapper) is BF16_Optimizer:
        return Zero12Engine(deepspeed_engine, bf16_optimizer=True)
    if type(wrapper) is FP16_Optimizer:
        return _stage0(
            deepspeed_engine,
            wrapper.optimizer,
            parameters=wrapper.fp16_groups,
            masters=wrapper.fp32_groups_flat,
        )
    if type(wrapper) is FP16_UnfusedOptimizer:
        return _stage0(
            deepspeed_engine,
            wrapper.optimizer,
            parameters=[[p] for group in wrapper.fp16_groups for p in group],
            masters=[m for group in wrapper.fp32_groups for m in group],
        )
    if isinstance(wrapper, torch.optim.Optimizer):
        parameters = _optimized_fp32(deepspeed_engine.module, wrapper)
        return _stage0(deepspeed_engine, wrapper, parameters=parameters, masters=None)
    raise UnsupportedEngineError(
        f"DeepSpeed trains with {type(wrapper).__name__}, whose masters this version does not average; use a "
        "torch optimizer (no `optimizer` block in the DeepSpeed config) or ZeRO stage 1, 2 or 3"
    )


def _stage0(
    deepspeed_engine: Any,
    optimizer: torch.optim.Optimizer,
    *,
    parameters: Sequence[Sequence[nn.Parameter]],
    masters: Sequence[Tensor] | None,
) -> Engine:
    engine = ReplicatedEngine(
        "deepspeed-zero0",
        deepspeed_engine.module,
        optimizer,
        parameters=parameters,
        masters=masters,
        steps_seen=partial(deepspeed_steps, deepspeed_engine),
    )
    engine.outer, engine.hands_out = deepspeed_engine, DEEPSPEED_CALLS
    return engine


def _is_a(instance: object, class_name: str) -> bool:
    # Looked for by name, so that a run without that engine never imports it.
    return any(cls.__name__ == class_name for cls in type(instance).__mro__)


def _unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside DDP and torch.compile, whichever wraps which, and whether DDP is among them."""
    wrapped = False
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, wrapped = model.module, True
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model, wrapped


def _optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's trainable parameters by name, each once, with the proof that the model trains no others."""
    held = {
        id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()
    }
    names = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    for identity in held.keys() - names.keys():
        raise unknown_parameter(held[identity].shape)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.numel() and id(parameter) not in held:
            raise LayoutError(
                f"{names[id(parameter)]!r} is trainable but in no optimizer group, so it would never change; give "
                "it to the optimizer, or freeze it with requires_grad_(False)"
            )
    return {names[identity]: parameter for identity, parameter in held.items()}


def _optimized_fp32(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The optimizer's parameters, one a list, where they are their own fp32 masters."""
    parameters = _optimized(module, optimizer)
    for name, parameter in parameters.items():
        require_fp32(
            name, parameter.dtype, "train.mixed_precision=bf16, or DeepSpeed, which keeps fp32 masters"
        )
    return [[parameter] for parameter in parameters.values()]
