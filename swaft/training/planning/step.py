"""One training step on tensors without data: a recipe's model, its longest batch and its objective.

On fake tensors, shapes, types and lifetimes are real but there are no values, so a model of any size takes seconds
and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swaft.errors import ConfigError, NoiseError
from swaft.training.config import TrainConfig
from swaft.training.launch.failure import message_of
from swaft.training.models.checks import require_form
from swaft.training.models.pretrained import form_of, naming_settings, with_adapters, with_checkpointing
from swaft.training.planning.memory import PlannedEngine, Weight

LENGTHS = {
    "sequence classification": ("max_seq_length", {"labels": None}),
    "question answering": ("max_seq_length", {"start_positions": None, "end_positions": None}),
    "sequence to sequence": ("max_source_length", {"labels": "max_target_length"}),
    "causal language modelling": ("max_length", {"labels": "max_length"}),
}
"""The settings for the length of a task's rows, and of their labels, by name; None: one number per row."""


class PlannedModel(NamedTuple):
    """Makes a model and one micro-batch."""

    build: Callable[[], Any]
    """Makes the model in fp32, with any weights."""
    batch: Callable[[], dict[str, Tensor]]
    """Makes the keyword arguments of its forward, every row as long as the settings allow."""


def planned_model(config: Any, model_config: Any) -> PlannedModel:
    """Return how to make a recipe's model, in the context of `OnPaper`, and its longest batch.

    Raises:
        ConfigError: the type of model has no form for the recipe's task.
    """
    model, task = config.model, config.task
    require_form(model, model_config, task)
    form = form_of(task)
    if model.described is not None:  # the special tokens and largest vocabulary that its tokenizer will have
        fitted = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        fitted["vocab_size"] = model.most_tokens
        model_config.update({name: value for name, value in fitted.items() if name not in model.described})
    elif getattr(model_config, "pad_token_id", None) is None and task == "sequence classification":
        model_config.pad_token_id = 0  # the tokenizer's in a run; any id takes the same memory

    def build() -> Any:
        with naming_settings(model):
            made = form.auto.from_config(
                model_config, dtype=torch.float32, trust_remote_code=model.trust_remote_code
            )
        # Tensors without data cannot be moved, so adapters stay where they are made.
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):
            return with_adapters(made, model, task=task)

    def batch() -> dict[str, Tensor]:
        rows, (length, labels) = config.train.per_device_train_batch_size, LENGTHS[task]
        lengths = {"input_ids": length, "attention_mask": length, **labels}
        shapes = {name: (rows, getattr(config.data, each)) for name, each in lengths.items() if each}
        return {name: torch.ones(shapes.get(name, (rows,)), dtype=torch.int64) for name in lengths}

    return PlannedModel(build, batch)


PROMOTED = [(F, name) for name in ("layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy")]
PROMOTED.append((torch, "softmax"))
"""Functions that autocast computes in fp32 on CUDA, but in 16 bits on a CPU."""
UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)
"""Errors that torch raises if tensors without data are not enough."""


class OnPaper(fake_tensor.FakeTensorMode):
    """Context of tensors without data, which makes up the values that are asked for.

    A bool is False (no batch without padding, no bad row), a number is 1. No size depends on them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or make up the value that it asks for."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], fake_tensor.FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> OnPaper:
        """Return this same context: the copy of a tensor belongs to it too."""
        return self


def trace_training_step(
    planned: PlannedModel, objective: Any, train: TrainConfig, engine: PlannedEngine
) -> tuple[list[Weight], int]:
    """Build the model and run one micro-batch, all on tensors without data.

    Args:
        planned: makes the model and its batch.
        objective: from `swaft.training.models.build.build_objective`.
        train: section ``train``, for gradient checkpointing.
        engine: how and in which format it computes, and which blocks it gathers.

    Returns:
        The weights, in the order of ``model.parameters()``, and the most bytes of `trace_step`.

    Raises:
        ConfigError: the objective refuses the model, or the step depends on values that are not there; names the
            operation.
    """
    try:
        with OnPaper(), _kernels(engine):
            model = with_checkpointing(planned.build(), train.gradient_checkpointing).train()
            objective.prepare_model(model)
            if (proved := getattr(objective, "_proved", None)) is not None:
                proved.add(model)  # skip the proof on the first batch, which compares values
            blocks = engine.blocks(model)
            if engine.casting == "weights":
                for parameter in model.parameters():  # not the buffers, as DeepSpeed and FSDP2 do
                    parameter.data = parameter.data.to(engine.dtype)
            elif engine.casting == "autocast":
                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", engine.dtype)(model.forward))
            weights = [
                Weight(p.numel(), p.element_size(), p.shape[0] if p.ndim else 1, p.requires_grad, block)
                for p, block in zip(model.parameters(), blocks, strict=True)
            ]
            batch = planned.batch()
            return weights, trace_step(model, lambda: objective(model, batch))
    except NoiseError as error:
        raise ConfigError(message_of(error)) from error
    except UNKNOWN as error:
        raise ConfigError(
            f"the model's step cannot be planned: {error.func} depends on the data, or cannot run without data "
            f"({type(error).__name__}); train a few steps and measure their memory"
        ) from error


def _kernels(engine: PlannedEngine) -> ExitStack:
    """Return a context, already entered, in which functions save the tensors they save on the engine's device.

    Functions are patched: no torch mode stays on while checkpointing runs forward again in backward.
    """
    replaced = [] if engine.on_cpu else [(F, "scaled_dot_product_attention", _without_dropout)]
    if replaced and engine.casting == "autocast":
        replaced += [(module, name, _in_fp32) for module, name in PROMOTED]
    context = ExitStack()
    for module, name, changed in replaced:
        context.enter_context(patch.object(module, name, changed(getattr(module, name))))
    return context


def _without_dropout(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On a GPU, attention is one kernel that saves no attention matrix; on a CPU only without dropout."""

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    return fused


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda values, *args, **kwargs: function(values.float(), *args, **kwargs)


def trace_step(model: nn.Module, compute: Callable[[], Any]) -> int:
    """Run forward and backward of one micro-batch, and return the peak number of bytes in use.

    Parameters, buffers and complete gradients, which the engine holds, are not counted.

    Args:
        model: the model, in training mode, not usable afterwards; its tensors may be fake.
        compute: returns a result with a loss, whose backward is run.
    """

    def take(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(take)
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
        result = compute()
        result.loss.backward()  # while the whole result is alive, as in the training loop
    return memory.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages, fake or real, from the operations that make them.

    Args:
        ignored: tensors whose storages are not counted.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        return result

    def _freed(self, size: int) -> None:
        self.live -= size
