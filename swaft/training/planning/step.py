"""One training step on tensors without data: the model, its batch and its objective, as an engine runs them.

On fake tensors shapes, types and lifetimes are real and values are not there, so a model of any size takes seconds
and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.models.build import build_optimizer
from swaft.training.models.pretrained import with_checkpointing

if TYPE_CHECKING:
    from swaft.training.planning.engines import PlannedEngine

FP32 = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments."""

PROMOTED = (
    *(
        (F, name)
        for name in ("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss")
    ),
    (torch, "softmax"),
)
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


class Moment(NamedTuple):
    """The end of forward or backward, or a gradient that is complete: bytes of all but what the engine holds.

    Parameters, buffers and finished gradients are not counted.
    """

    peak_bytes: int
    """Most in use since the moment before."""
    live_bytes: int
    """In use now."""
    parameter: int | None = None
    """Whose gradient is complete, by its position in ``model.parameters()``."""


@dataclass(frozen=True)
class TracedStep:
    """What one training step was found to take."""

    weights: Sequence[Weight]
    """In the order of ``model.parameters()``."""
    moments: Sequence[Moment]
    """Of any micro-batch but the first."""
    blocks: Sequence[int]
    """The block each parameter is gathered with, under an engine that gathers blocks."""


def trace_training_step(
    build_model: Callable[[], Any],
    make_batch: Callable[[], Mapping[str, Tensor]],
    objective: Any,
    train: TrainConfig,
    engine: PlannedEngine,
) -> TracedStep:
    """Build the model and run one micro-batch, all on fake tensors.

    Values that are asked for are supposed: a yes or no is a no (no batch without padding, no row that is wrong), a
    number is 1. No size depends on them.

    Args:
        build_model: makes the model, fp32, from its configuration.
        make_batch: makes the keyword arguments of its forward, of full length.
        objective: from `swaft.training.models.build.build_objective`.
        train: section ``train``, for the optimizer's groups and gradient checkpointing.
        engine: how and in which format it computes, and which blocks it gathers.

    Raises:
        ConfigError: the step depends on values that fake tensors do not have; names the operation.
    """
    try:
        with fake_tensor.FakeTensorMode(), _SupposedValues(), _device_kernels(on_cpu=engine.on_cpu):
            model = with_checkpointing(build_model(), train.gradient_checkpointing).train()
            objective.prepare_model(model)
            if (proved := getattr(objective, "_proved", None)) is not None:
                proved.add(model)  # the proof on the first batch compares values
            groups = build_optimizer(model, train).param_groups
            numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
            blocks = engine.blocks(model)
            if engine.casting == "weights":
                for parameter in model.parameters():  # not the buffers, as DeepSpeed and FSDP2 do
                    parameter.data = parameter.data.to(engine.dtype)
            elif engine.casting == "autocast":
                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", engine.dtype)(model.forward))
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
            return TracedStep(weights, trace_step(model, lambda: objective(model, batch)), blocks)
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    ) as error:
        raise ConfigError(
            f"the model's step cannot be planned: {error.func} depends on the data, or has no form without data "
            f"({type(error).__name__}); train a few steps and read the memory that they took"
        ) from error


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
        self._seen = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        return result

    def restart_peak(self) -> int:
        """Return the most bytes since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _freed(self, size: int) -> None:
        self.live -= size


class _SupposedValues(TorchDispatchMode):
    """Answers what is asked of a fake tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and isinstance(args[0], fake_tensor.FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _device_kernels(*, on_cpu: bool) -> Iterator[None]:
    """Context in which a step meant for a GPU runs what runs there, where a CPU's choice takes other memory.

    With dropout, attention on a CPU keeps its weights, (rows, heads, queries, keys); on a GPU it is one kernel that
    keeps none, as the CPU's is without dropout. Functions are replaced by hand: no mode of torch's stays on while
    checkpointing runs forward again in backward.
    """
    attention = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *more: Any,
        **kwargs: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *more, **kwargs)

    def promoted(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(args[0].float(), *args[1:], **kwargs)

    with ExitStack() as replaced:
        if not on_cpu:
            replaced.enter_context(patch.object(F, "scaled_dot_product_attention", fused))
            for module, name in PROMOTED:
                ours = partial(promoted, getattr(module, name))
                replaced.enter_context(patch.object(module, name, ours))
        yield
