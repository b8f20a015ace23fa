"""One training step on tensors without data: a recipe's model, its longest batch and its objective.

On fake tensors shapes, types and lifetimes are real and values are not there, so a model of any size takes seconds
and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig
from swaft.training.models.pretrained import FORMS, naming_settings, with_adapters, with_checkpointing

if TYPE_CHECKING:
    from swaft.training.planning.memory import PlannedEngine

LENGTHS = {
    "sequence classification": ("max_seq_length", {"labels": None}),
    "question answering": ("max_seq_length", {"start_positions": None, "end_positions": None}),
    "sequence to sequence": ("max_source_length", {"labels": "max_target_length"}),
    "causal language modelling": ("max_length", {"labels": "max_length"}),
}
"""The settings that say how long rows of a task are, and their labels, by name; None: a number a row."""


class PlannedModel(NamedTuple):
    """What one micro-batch is made of."""

    build: Callable[[], Any]
    """Makes the model, fp32, with whatever weights."""
    batch: Callable[[], dict[str, Tensor]]
    """Makes a batch in which every row is as long as the settings allow."""


def planned_model(config: Any, model_config: Any) -> PlannedModel:
    """Return how to make a recipe's model and its longest batch.

    Args:
        config: a recipe's configuration.
        model_config: the model's, as transformers has it.
    """
    model, task = config.model, config.task
    if (
        said := model.described
    ) is not None:  # the special tokens, and the most tokens, that its tokenizer will have
        fitted = {
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "vocab_size": model.most_tokens,
        }
        model_config.update({name: value for name, value in fitted.items() if name not in said})
    elif getattr(model_config, "pad_token_id", None) is None and task == "sequence classification":
        model_config.pad_token_id = 0  # the tokenizer's in a run; any number takes as much memory
    if task == "causal language modelling":
        model_config.use_cache = False

    def build() -> Any:
        # Some draw their weights by looking at them, which tensors without data do not bear (vision towers).
        with naming_settings(model), no_init_weights():
            made = FORMS[task].auto.from_config(
                model_config, dtype=torch.float32, trust_remote_code=model.trust_remote_code
            )
        made.tie_weights()  # which belongs to what was left out
        # Without data no adapter can be moved to its layer, and a copied head would bring a copy of the mode.
        with (
            patch.object(nn.Module, "to", lambda module, *_, **__: module),
            patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True),
        ):
            return with_adapters(made, model, task=task)

    def batch() -> dict[str, Tensor]:
        rows, (length, labels) = config.train.per_device_train_batch_size, LENGTHS[task]
        settings = {"input_ids": length, "attention_mask": length} | labels
        shapes = {
            name: (rows, getattr(config.data, each)) if each else (rows,) for name, each in settings.items()
        }
        return {name: torch.ones(shape, dtype=torch.int64) for name, shape in shapes.items()}

    return PlannedModel(build, batch)


FP32 = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments."""
PROMOTED = ("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss")
"""What autocast computes in fp32 on CUDA, and in 16 bits on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of the model; a tied one counts once."""

    numel: int
    rows: int = 1
    """Size of its first dimension."""
    itemsize: int
    """Bytes of an element of the working weight."""
    trained: bool = True
    """Whether it is trained; else it is frozen."""
    block: int = 0
    """The block it is gathered with, under an engine that gathers blocks; 0: it lies in none."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole working weight."""
        return self.numel * self.itemsize


class Activations(NamedTuple):
    """Bytes that a micro-batch takes, parameters, buffers and finished gradients apart, which the engine holds."""

    peak: int
    """Most in use in forward and backward."""
    late: int
    """Most in use beside the gradients once three of four are complete; with checkpointing that is much."""
    kept: int
    """Left until the next micro-batch: the logits, for the most part."""


def trace_training_step(
    build_model: Callable[[], Any],
    make_batch: Callable[[], Mapping[str, Tensor]],
    objective: Any,
    train: TrainConfig,
    engine: PlannedEngine,
) -> tuple[list[Weight], Activations]:
    """Build the model and run one micro-batch, all on fake tensors.

    Values that are asked for are supposed: a yes or no is a no (no batch without padding, no row that is wrong), a
    number is 1. No size depends on them.

    Args:
        build_model: makes the model, fp32, from its configuration.
        make_batch: makes the keyword arguments of its forward, of full length.
        objective: from `swaft.training.models.build.build_objective`.
        train: section ``train``, for gradient checkpointing.
        engine: how and in which format it computes, and which blocks it gathers.

    Returns:
        The weights, in the order of ``model.parameters()``, and what the micro-batch takes.

    Raises:
        ConfigError: the step depends on values that fake tensors do not have; names the operation.
    """
    try:
        with fake_tensor.FakeTensorMode(), _SupposedValues(), _device_kernels(on_cpu=engine.on_cpu):
            model = with_checkpointing(build_model(), train.gradient_checkpointing).train()
            objective.prepare_model(model)
            if (proved := getattr(objective, "_proved", None)) is not None:
                proved.add(model)  # the proof on the first batch compares values
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
                    trained=p.requires_grad,
                    block=block,
                )
                for p, block in zip(model.parameters(), blocks, strict=True)
            ]
            batch = dict(make_batch())
            return weights, trace_step(model, lambda: objective(model, batch))
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    ) as error:
        raise ConfigError(
            f"the model's step cannot be planned: {error.func} depends on the data, or has no form without data "
            f"({type(error).__name__}); train a few steps and read the memory that they took"
        ) from error


def trace_step(model: nn.Module, compute: Callable[[], Any]) -> Activations:
    """Run forward and backward of one micro-batch, and return what is in use.

    What the objective returned (the logits, for the most part) lives until the next micro-batch has returned, as in
    the training loop: it is counted in the forward of the next. Gradients are taken away once they are complete.

    Args:
        model: the model, in training mode; its tensors may be fake.
        compute: gives a result with a loss, whose backward is run.
    """
    held: list[int] = []

    def take(parameter: Tensor) -> None:
        parameter.grad = None
        held.append(memory.live)

    with LiveBytes([*model.parameters(), *model.buffers()]) as memory, ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        result = compute()
        forward = memory.restart_peak()
        result.loss.backward()
    late = max(held[len(held) * 3 // 4 :])
    return Activations(max(forward + memory.live, memory.peak), late, memory.live)


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
        query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *more: Any, **kwargs: Any
    ) -> Tensor:
        kwargs.pop("dropout_p", None)
        return attention(query, key, value, kwargs.pop("attn_mask", mask), 0.0, *more[1:], **kwargs)

    def promoted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def in_fp32(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return function(values, *args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return function(values.float(), *args, **kwargs)

        return in_fp32

    with ExitStack() as replaced:
        if not on_cpu:
            replaced.enter_context(patch.object(F, "scaled_dot_product_attention", fused))
            for module, name in [*((F, name) for name in PROMOTED), (torch, "softmax")]:
                replaced.enter_context(patch.object(module, name, promoted(getattr(module, name))))
        yield
