"""One training step on tensors without data: the model, its batch and its objective, as an engine runs them.

On fake tensors shapes, types and lifetimes are real and values are not there, so a model of any size takes seconds
and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
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
from torch.utils._pytree import tree_leaves

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.models.build import build_optimizer
from swaft.training.models.pretrained import with_checkpointing

FP32 = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments."""

Casting = Literal["none", "autocast", "weights"]
"""How a 16-bit format is computed in: not at all; by autocast, weights staying fp32; by weights cast beforehand."""

PROMOTED = (F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, torch.softmax)
"""What autocast computes in fp32 on CUDA, and in 16 bits on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of the model; a tied one counts once."""

    numel: int
    rows: int = 1
    """Size of its first dimension."""
    itemsize: int
    """Bytes of an element of the working weight."""
    group: int | None
    """Parameter group of the optimizer; None: frozen."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole working weight."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Moment:
    """The end of forward or backward, or a gradient that is complete.

    Parameters, buffers and finished gradients are not counted: where those go is the engine's affair.
    """

    peak_bytes: int
    """Most bytes in use since the moment before."""
    live_bytes: int
    """Bytes in use now."""
    parameter: int | None = None
    """Whose gradient is complete, by its position in ``model.parameters()``."""


@dataclass(frozen=True)
class TracedStep:
    """What one training step was found to take."""

    weights: Sequence[Weight]
    """In the order of ``model.parameters()``."""
    moments: Sequence[Moment]
    """Of any micro-batch but the first."""
    blocks: Sequence[int] = ()
    """The block each parameter is gathered with, under an engine that gathers blocks."""

    @property
    def kept_bytes(self) -> int:
        """What a micro-batch leaves until the next one: its logits, for the most part."""
        return self.moments[-1].live_bytes if self.moments else 0


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
        objective: from `swaft.training.models.build.build_objective`.
        train: section ``train``, for the optimizer's groups and gradient checkpointing.
        casting: how ``dtype`` is computed in.
        dtype: of the working weights, or of autocast.
        on_cpu: whether CPU ranks train; else attention is a fused kernel, as on a GPU.
        find_blocks: gives the block of each parameter.

    Raises:
        ConfigError: the step depends on values that fake tensors do not have; names the operation.
    """
    try:
        with FakeTensorMode(), _Supposed(), _Kernels(on_cpu=on_cpu):
            model = with_checkpointing(build_model(), train.gradient_checkpointing)
            model.train()
            objective.prepare_model(model)
            proved = getattr(objective, "_proved", None)
            if proved is not None:  # the proof on the first batch compares values
                proved.add(model)
            groups = build_optimizer(model, train).param_groups
            numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
            blocks = find_blocks(model)
            if casting == "weights":
                for parameter in model.parameters():  # not the buffers, as DeepSpeed and FSDP2 do
                    parameter.data = parameter.data.to(dtype)
            elif casting == "autocast":
                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype)(model.forward))
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


def trace_step(model: nn.Module, compute: Callable[[], Any]) -> list[Moment]:
    """Run forward and backward of one micro-batch, and return what is in use when.

    What the objective returned (the logits, for the most part) lives until the next micro-batch has returned, as in
    the training loop: it is counted in the forward of the next. Gradients are taken away once they are complete.

    Args:
        model: the model, in training mode; its tensors may be fake.
        compute: gives a result with a loss, whose backward is run.

    Returns:
        The end of forward, each gradient in the order of backward, and the end of backward.
    """
    gradients: list[Moment] = []
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory, ExitStack() as hooks:

        def take(number: int, parameter: Tensor) -> None:
            parameter.grad = None
            gradients.append(Moment(memory.restart_peak(), memory.live, number))

        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p, number=number: take(number, p))
                hooks.callback(hook.remove)
        result = compute()
        forward, live = memory.restart_peak(), memory.live
        result.loss.backward()
        end = Moment(memory.restart_peak(), memory.live)
    return [Moment(forward + end.live_bytes, live + end.live_bytes), *gradients, end]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, fake or real, from the operations that make them.

    Args:
        ignored: tensors whose storages are not counted.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in ignored:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                size = self._seen[storage] = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, size).atexit = False
        return result

    def restart_peak(self) -> int:
        """Return the most bytes since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _freed(self, size: int) -> None:
        self.live -= size


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
