"""One training step on tensors without data: the model, its batch and its objective, as an engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from swaft.config import TrainConfig
from swaft.errors import ConfigError
from swaft.planning.memory import Weight
from swaft.planning.trace import Moment, trace_step
from swaft.training.build import build_optimizer
from swaft.training.pretrained import with_checkpointing

Casting = Literal["none", "autocast", "weights"]
"""How a 16-bit format is computed in: not at all; by autocast, weights staying fp32; by weights cast beforehand."""

PROMOTED = (F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, torch.softmax)
"""What autocast computes in fp32 on CUDA, and in 16 bits on a CPU."""


@dataclass(frozen=True)
class TracedStep:
    """What one training step was found to take."""

    weights: list[Weight]
    """In the order of ``model.parameters()``."""
    moments: list[Moment]
    """Of any micro-batch but the first."""
    blocks: list[int]
    """Which block each parameter is gathered with, under an engine that gathers blocks."""


def trace_training_step(
    build_model: Callable[[], Any],
    make_batch: Callable[[], Mapping[str, Tensor]],
    objective: Any,
    train: TrainConfig,
    *,
    casting: Casting,
    dtype: torch.dtype,
    on_cpu: bool,
    find_blocks: Callable[[nn.Module], list[int]],
) -> TracedStep:
    """Build the model and run one micro-batch, all on fake tensors.

    Values that are asked for are supposed: a yes or no is a no (no batch without padding, no row that is wrong), a
    number is 1. No size depends on them.

    Args:
        build_model: makes the model, fp32, from its configuration.
        make_batch: makes the keyword arguments of its forward, of full length.
        objective: from `swaft.training.build.build_objective`.
        train: section ``train``, for the optimizer's groups and gradient checkpointing.
        casting: how ``dtype`` is computed in.
        dtype: of the working weights, or of autocast.
        on_cpu: whether CPU ranks train; else attention is a fused kernel, as on a GPU.
        find_blocks: gives the block of each parameter.

    Raises:
        ConfigError: the model asks for what tensors without data cannot tell, naming the operation.
    """
    try:
        with FakeTensorMode(), _Supposed(), _Kernels(on_cpu=on_cpu):
            model = with_checkpointing(build_model(), train.gradient_checkpointing)
            model.train()
            objective.prepare_model(model)
            _skip_proof(objective, model)
            numbers, blocks = _groups(model, train), find_blocks(model)
            if casting == "weights":
                _cast(model, dtype)
            elif casting == "autocast":
                forward = torch.autocast("cpu", dtype)(model.forward)
                model.forward = convert_outputs_to_fp32(forward)
            weights = [
                Weight(
                    numel=p.numel(),
                    rows=p.shape[0] if p.ndim else 1,
                    itemsize=p.element_size(),
                    group=numbers.get(id(p)),
                )
                for p in model.parameters()
            ]
            batch = dict(make_batch())
            moments = trace_step(model, lambda: objective(model, batch))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ConfigError(
            f"the model's step cannot be planned: {error.func} depends on the data, or has no form without data "
            f"({type(error).__name__}); train a few steps and read the memory that they took"
        ) from error
    return TracedStep(weights, moments, blocks)


class _Supposed(TorchDispatchMode):
    """Answers what is asked of a fake tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Kernels(TorchFunctionMode):
    """Runs what runs on a device where the CPU's own choice would take other memory.

    With dropout, attention on a CPU keeps its weights, (rows, heads, queries, keys); on a GPU it is one kernel that
    keeps none, as the CPU's is without dropout.
    """

    def __init__(self, *, on_cpu: bool):
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._on_cpu:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        if func in PROMOTED and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _skip_proof(objective: Any, model: nn.Module) -> None:
    """Keep a noise objective from proving itself on the first batch: that compares values."""
    proved = getattr(objective, "_proved", None)
    if proved is not None:
        proved.add(model)


def _groups(model: nn.Module, train: TrainConfig) -> dict[int, int]:
    """Return the optimizer's group of each trained parameter, by the parameter's id."""
    groups = build_optimizer(model, train).param_groups
    return {id(p): number for number, group in enumerate(groups) for p in group["params"]}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights, not the buffers, as DeepSpeed and FSDP2 do."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
