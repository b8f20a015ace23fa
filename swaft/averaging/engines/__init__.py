"""One adapter per engine: where its fp32 master weights live, and how forwards come to see a change of them.

:func:`attach_engine` picks the adapter for a model and optimizer, or refuses and names the setting in the way.

It looks at the objects, never at a configured stage number: stage 1 alone has two wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from swaft.averaging.engines.base import Engine
from swaft.averaging.engines.replicated import ReplicatedEngine, optimized, optimized_fp32
from swaft.averaging.engines.steps import StepCounter
from swaft.distributed import is_distributed
from swaft.errors import AveragingError, UnsupportedEngineError

__all__ = ["Engine", "attach_engine"]


def attach_engine(model: nn.Module, optimizer: Any) -> Engine:
    """Return the adapter for what `accelerator.prepare` returned (collective).

    Args:
        model: a plain module, a DistributedDataParallel one, one sharded by FSDP2, or a DeepSpeed engine.
        optimizer: its optimizer, with or without accelerate's wrapper; if there are several (Muon and AdamW, say),
            a sequence in the order they step. DeepSpeed has one, which is taken from its engine.

    Raises:
        UnsupportedEngineError: the fp32 masters of this engine or mode cannot be averaged faithfully.
        LayoutError: the masters are not where the adapter expects them, or a trainable parameter is in no
            optimizer group.
        AveragingError: there is nothing to average.
    """
    if _is_a(model, "DeepSpeedEngine"):
        from swaft.averaging.engines.deepspeed import attach_deepspeed

        engine = attach_deepspeed(model)
    else:
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        engine = _attach_torch(
            model, [each.optimizer if _is_a(each, "AcceleratedOptimizer") else each for each in given]
        )
    # When DeepSpeed wraps a 16-bit model at stage 0, it takes one optimizer step with zero gradients. Weight decay
    # then moves the masters, and the weights are not a cast of them until the first real step.
    if engine.name != "deepspeed-zero0" or engine.masters_are_working() or engine.applied_steps() > 0:
        engine.prove_layout()
    if not engine.ranks.sum([engine.numel])[0]:
        raise AveragingError("the model has no trainable parameter; expected at least one to average")
    return engine


def _attach_torch(model: nn.Module, optimizers: Sequence[Any]) -> Engine:
    if not optimizers or not all(isinstance(each, torch.optim.Optimizer) for each in optimizers):
        found = (
            "a " + ", a ".join(type(each).__name__ for each in optimizers) if optimizers else "an empty list"
        )
        raise UnsupportedEngineError(
            f"the optimizer is {found}, expected a torch.optim.Optimizer, or several in a list, the last to step "
            "at the end; pass model and optimizer as `accelerator.prepare` returned them, or `deepspeed.initialize`"
        )
    for each in optimizers:
        if not hasattr(each, "_optimizer_step_pre_hooks"):  # what torch's own __init__ sets
            name = type(each).__name__
            raise UnsupportedEngineError(
                f"{name} does not call the __init__ of torch.optim.Optimizer, so its steps cannot be seen; "
                "expected one that does. If it wraps another optimizer, attach to that one: "
                "WeightAverager(model, wrapper.optimizer, ...)"
            )
    module, wrapped = _unwrap(model)
    parts = {cls.__name__ for part in module.modules() for cls in type(part).__mro__}
    if "FullyShardedDataParallel" in parts:
        raise UnsupportedEngineError(
            "the model is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters this version does not "
            "average; use FSDP2: `fully_shard` (accelerate: fsdp_version=2)"
        )
    if "FSDPModule" in parts:
        from swaft.averaging.engines.fsdp2 import FSDP2Engine, refuse_layout, reshard

        reshard(module)
        parameters = optimized(module, optimizers)
        for name, parameter in parameters.items():
            refuse_layout(name, parameter)
        return FSDP2Engine(
            "fsdp2",
            module,
            optimizers,
            parameters=[[parameter] for parameter in parameters.values()],
            steps_seen=StepCounter(*optimizers),
        )
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        raise UnsupportedEngineError(
            "the parameters are DTensors, but not by `fully_shard`: tensor parallelism, which this version does "
            "not average; train with FSDP2 alone"
        )
    if not wrapped and is_distributed() and dist.get_world_size() > 1:
        raise UnsupportedEngineError(
            f"{dist.get_world_size()} ranks train, but the model is a bare {type(model).__name__}; expected what "
            "`accelerator.prepare` returns (attach after it), a DistributedDataParallel or DeepSpeed's engine, not "
            "their `module`. On a CPU accelerate wraps the model only with Accelerator(cpu=True), or "
            "TrainingArguments(use_cpu=True)"
        )
    devices = {parameter.device for parameter in module.parameters() if parameter.requires_grad}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UnsupportedEngineError(
            f"the trained parameters lie on {', '.join(sorted(map(str, devices)))}, expected one device per "
            "process, where they have values; load the model without device_map"
        )
    return ReplicatedEngine(
        "ddp" if wrapped else "plain",
        module,
        optimizers,
        parameters=optimized_fp32(module, optimizers),
        steps_seen=StepCounter(*optimizers),
    )


def _is_a(instance: object, class_name: str) -> bool:
    # Looked up by name, so that a run without that engine never imports it.
    return any(cls.__name__ == class_name for cls in type(instance).__mro__)


def _unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside its wrappers (DDP, DataParallel, torch.compile), and whether DDP is one of them."""
    wrapped = False
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, wrapped = model.module, True
        elif isinstance(model, nn.DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model, wrapped
