"""The language-model head of a Hugging Face model: found, described, replaced for a pass; and how a loss gets out.

Engines hook the outputs of modules: ZeRO-3 and FSDP2 fetch a layer's weight in the backward pass when the gradient
of its output arrives. So a loss computed in the head must leave as the head's output; otherwise its gradient would
find the weight partitioned. What the model does to that output afterwards (a bias, a soft-cap, a scale, a cast)
must not touch the loss. So this route only determines the order of the backward pass; the value of the loss and its
gradient are passed around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parallel.distributed import _DDPSink

from swaft.errors import NoiseError
from swaft.noise.checks import is_compiled, layers, unwrap
from swaft.noise.loss.options import wide_dtype

_SLOW_TWIN = "Set fused=False, which computes the loss from the logits of both passes."


@dataclass(frozen=True)
class LanguageModelHead:
    """The linear layer that turns hidden states into logits, and what the model does to them afterwards.

    logits = softcap(logit_scale * (hidden @ weight.T + bias) + logits_bias),
    softcap(z) = softcap * tanh(z / softcap)
    """

    linear: nn.Linear
    """The layer itself. Its weight may be tied, and may be partitioned outside its forward."""
    logit_scale: float = 1.0
    """Factor on the layer's output (Cohere, Granite)."""
    softcap: float | None = None
    """Bound on the logits, applied with tanh (Gemma); None for none."""
    logits_bias: Tensor | None = None
    """A buffer (V,) that the model adds to the logits (BART and relatives)."""

    def transform(self, output: Tensor) -> Tensor:
        """Apply what the model does to the layer's output, in at least fp32."""
        logits = self.logit_scale * output.to(wide_dtype(output))
        if self.logits_bias is not None:
            logits = logits + self.logits_bias
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss_arguments(self) -> dict[str, Any]:
        """Arguments of the fused linear loss for this head; only inside its forward, where its weight is whole.

        Raises:
            NoiseError: the weight is split over ranks even there, or quantised.
        """
        weight, bias = self.linear.weight, self.linear.bias
        # A fake tensor stands for a plain one during memory planning and compilation.
        if type(weight) not in (Tensor, nn.Parameter, FakeTensor):
            raise NoiseError(
                f"The head's weight is a {type(weight).__name__} in its own forward; expected a plain tensor, "
                f"neither quantised nor split by tensor parallelism. {_SLOW_TWIN}"
            )
        if bias is not None:
            bias = self.logit_scale * bias
        if self.logits_bias is not None:
            bias = self.logits_bias if bias is None else bias + self.logits_bias
        return {"weight": weight, "bias": bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    @contextmanager
    def replaced(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Run one pass in which the layer computes ``forward(hidden)`` instead.

        The layer stays where it is, so names, ties, hooks and partitioning are the model's own.

        Raises:
            NoiseError: the layer did not run exactly once.
        """
        calls = 0

        def instead(input: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return forward(input)

        self.linear.forward = instead  # an attribute of the instance, found before the class's method
        try:
            yield
        finally:
            del self.linear.forward
        if calls != 1:
            raise NoiseError(
                f"The language-model head ran {calls} times in one forward pass; expected once, in a model that is "
                f"not compiled. {_SLOW_TWIN}"
            )


def find_head(model: nn.Module) -> LanguageModelHead:
    """Find the language-model head of a model, wrapped or not, and what follows it.

    What follows the head is read from the model's attributes, by the names that Hugging Face models share;
    `swaft.noise.proof` compares it with what the model computes.

    Raises:
        NoiseError: the head is not a plain linear layer: it is adapted, quantised, replaced, or compiled with the
            model.
    """
    network = unwrap(model)
    if any(is_compiled(module) for module in (*layers(model), network)):
        raise NoiseError(
            f"{type(network).__name__} is compiled whole, including its head, which the fused loss must replace; "
            "expected an uncompiled head. Compile its layers one by one (`layer.compile()`). "
            f"{_SLOW_TWIN}"
        )
    module = _active_copy(network.get_output_embeddings())  # type: ignore[operator]
    if hasattr(module, "_hf_hook"):
        raise NoiseError(
            f"{type(network).__name__} was loaded over several devices (device_map), and accelerate moves what its "
            f"head is given; expected a model on one device: load it without device_map. {_SLOW_TWIN}"
        )
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        raise NoiseError(
            f"The head of {type(network).__name__} is a {type(module).__name__} with a forward of its own; "
            "expected a torch.nn.Linear. Take it out of the adapter's target_modules (modules_to_save is "
            f"fine) and do not quantise it. {_SLOW_TWIN}"
        )
    config = _text_config(network)
    logits_bias = getattr(network, "final_logits_bias", None)
    return LanguageModelHead(
        module,  # type: ignore[arg-type]
        logit_scale=(getattr(config, "logit_scale", None) or 1.0)
        / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        logits_bias=logits_bias.flatten() if isinstance(logits_bias, Tensor) else None,
    )


def _active_copy(module: Any) -> Any:
    """The active copy in peft's wrapper of modules_to_save, which is the one that trains."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return copies[module.active_adapters[0]]


def _text_config(network: nn.Module) -> Any:
    config = getattr(network, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config(decoder=True) if callable(get_text_config) else config


def placeholder(hidden: Tensor) -> Tensor:
    """A substitute for the logits of hidden states (..., d) where they are not needed, (1, 1, 1)."""
    return hidden.new_zeros(1, 1, 1)


class LossSlot:
    """Carries one loss out of the model: ``leave`` inside the head, ``arrive`` after the model has returned."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._gradient: Tensor | None = None

    def leave(self, loss: Tensor) -> Tensor:
        """What the head returns instead of its logits, (1, 1, 1): a zero that takes part in autograd.

        Args:
            loss: 0-dim.
        """
        self._loss = loss
        return _Leave.apply(loss, self)  # type: ignore[no-any-return]

    def arrive(self, logits: Tensor) -> Tensor:
        """Take the loss out again.

        Args:
            logits: what the model made of the head's output.

        Returns:
            The loss, 0-dim, differentiable if it was.

        Raises:
            NoiseError: the model cuts the gradient after its head, or trains weights there, which would get no
                gradient.
        """
        loss, self._loss = self._loss, None
        assert loss is not None, "no loss has left the head"
        if loss.requires_grad:
            _refuse_cut_or_trained_path(logits)
        return _Arrive.apply(logits, loss.detach(), self)  # type: ignore[no-any-return]


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, slot: LossSlot) -> Tensor:
        ctx.slot = slot
        return loss.new_zeros(1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *_grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.slot._gradient, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, slot: LossSlot) -> Tensor:
        ctx.slot = slot
        ctx.save_for_backward(logits)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slot._gradient = grad_outputs[0]
        return torch.zeros_like(ctx.saved_tensors[0]), None, None


def _refuse_cut_or_trained_path(logits: Tensor) -> None:
    """Walk the few nodes between the model's output and its head; a leaf among them is a trained weight."""
    waiting: list[tuple[Any, int]] = [(logits.grad_fn, logits.output_nr)]
    seen, leaves, connected = set(), [], False
    while waiting:
        node, position = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, _DDPSink._backward_cls):  # type: ignore[attr-defined]
            waiting.append(node.next_functions[position])  # it passes all outputs on, in order
            continue
        if isinstance(node, _Leave._backward_cls):  # type: ignore[attr-defined]
            connected = True
            continue
        weight = getattr(node, "variable", None)  # set on nodes that accumulate a leaf's gradient
        if weight is not None:
            leaves.append(tuple(weight.shape))
        waiting.extend(node.next_functions)
    if leaves or not connected:
        found = f"applies a trainable weight of shape {leaves[0]} to" if leaves else "cuts the gradient of"
        raise NoiseError(
            f"The model {found} its logits, after its head; expected the head to be the last to train. {_SLOW_TWIN}"
        )
