"""The passes of one step, and the loss between them: from logits, or from hidden states inside the head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swaft.errors import NoiseError
from swaft.noise.checks import check_rows, layers
from swaft.noise.embedding import Disturbance, Embedded, embedding_hook
from swaft.noise.head import LanguageModelHead, LossSlot, placeholder
from swaft.noise.inputs import IGNORE_INDEX, Inputs, part, task_logits
from swaft.noise.loss.losses import (
    NoiseStabilityLoss,
    cross_entropy_symmetric_kl,
    linear_cross_entropy_symmetric_kl,
)
from swaft.noise.presets import NoiseSettings
from swaft.noise.spectral import power_iteration_paused

Forward = Callable[[], Any]
"""Runs one pass and returns the model's output."""

Pair = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Combines the result of the last pass with that of the first: (clean, noised)."""


def random_state_kept(
    model: nn.Module, batch: dict[str, Any], *, enabled: bool = True
) -> AbstractContextManager[None]:
    """Context that restores torch's global generators at its end, so the next pass draws the same dropout masks.

    Those of the CPU and of the accelerators that hold the model or the batch: FSDP2 with offloading keeps the
    parameters on the CPU and computes where the batch is.
    """
    tensors = [*model.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng(devices, enabled=enabled, device_type=kind)


class SentCount:
    """How many flags are set: the copy to the host starts now, and the number is read after more work is queued.

    Args:
        flags: bool, any shape.
    """

    def __init__(self, flags: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._number = flags.sum()
        if flags.is_cuda:
            pinned = torch.empty((), dtype=self._number.dtype, device="cpu", pin_memory=True)
            self._number = pinned.copy_(self._number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flags.device))  # not necessarily the current device

    def read(self) -> int:
        """Wait for the work queued before the number, and return it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._number)


@dataclass(frozen=True)
class LogitsForm:
    """The loss from the logits of both passes."""

    inputs: Inputs
    options: dict[str, Any]
    """Arguments of the loss, by name."""
    objective: str
    """Its name, for messages."""

    def observe(self, forward: Forward) -> Tensor:
        """Run the first of two passes; returns its logits, which the loss needs."""
        return self._checked(task_logits(forward()))

    def conclude(self, forward: Forward, pair: Pair) -> tuple[NoiseStabilityLoss, Tensor | None]:
        """Run the last pass; returns the loss, and the clean logits, detached."""
        clean, noised = pair(task_logits(forward()))
        loss = cross_entropy_symmetric_kl(self._checked(clean), noised, self.inputs.targets, **self.options)
        return loss, clean.detach()

    def _checked(self, rows: Tensor) -> Tensor:
        check_rows(rows, self.inputs.targets, self.objective)
        return rows


@dataclass(frozen=True)
class FusedForm(LogitsForm):
    """The loss from the hidden states of both passes, computed in the head of the last one."""

    head: LanguageModelHead
    num_counted: Callable[[], int]
    """Returns the number of rows that enter the loss."""

    def observe(self, forward: Forward) -> Tensor:
        """Run the first of two passes; returns the input of its head."""
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return placeholder(hidden)

        with self.head.replaced(keep):
            forward()
        return seen[0]

    def conclude(self, forward: Forward, pair: Pair) -> tuple[NoiseStabilityLoss, Tensor | None]:
        """Run the last pass; returns the loss, and no logits."""
        slot, results = LossSlot(), []

        def compute(hidden: Tensor) -> Tensor:
            clean, noised = pair(hidden)
            results.append(
                linear_cross_entropy_symmetric_kl(
                    self._checked(clean),
                    noised,
                    labels=self.inputs.targets,
                    num_counted=self.num_counted(),
                    **self.head.loss_arguments(),
                    **self.options,
                )
            )
            return slot.leave(results[0].loss)

        with self.head.replaced(compute):
            output = forward()
        return results[0]._replace(loss=slot.arrive(part(output, "logits"))), None


def choose_form(
    inputs: Inputs,
    settings: NoiseSettings,
    *,
    weight: float,
    head: LanguageModelHead | None,
    objective: str,
) -> LogitsForm:
    """Choose how the loss is computed, and set its options.

    Args:
        inputs: of the step.
        settings: of the objective.
        weight: factor on the divergence.
        head: the head to compute with; None for a loss from logits.
        objective: name of the objective, for messages.
    """
    targets = inputs.targets
    options: dict[str, Any] = {
        "divergence_weight": float(weight * settings.scale / settings.task_scale),  # a kernel refuses numpy's
        "label_smoothing": float(settings.label_smoothing),
        "ignore_index": IGNORE_INDEX,
        "token_weight": inputs.weights,
        "detach": settings.detach,
        "ce_on_noised": settings.ce_on_noised,
    }
    everywhere = settings.reduction == "batchmean"
    if everywhere:
        rows = torch.ones_like(targets, dtype=torch.bool)
        options |= {"kl_mask": rows, "kl_normalizer": targets.shape[0]}
    if head is None:
        return LogitsForm(inputs, options, objective)
    # With equal masks the passes differ little, so only their difference is accurate; otherwise they differ much.
    options["form"] = "difference" if settings.masks == "shared" else "direct"
    num_counted = targets.numel if everywhere else SentCount(targets != IGNORE_INDEX).read
    return FusedForm(inputs, options, objective, head, num_counted)


def run_passes(
    model: nn.Module, form: LogitsForm, noise: Disturbance
) -> tuple[NoiseStabilityLoss, Tensor | None, Embedded | None]:
    """Run the passes of one step.

    Two passes are a clean and a noised one. The noised pass comes first if it needs no gradients, so that no
    activations wait for it, and second otherwise. A doubled pass is both at once.

    Args:
        model: the model as wrapped by the training engine.
        form: how the loss is computed.
        noise: of the step.

    Returns:
        The loss, differentiable, and its parts; logits of the clean pass, detached, or None if none were computed;
        the record of the embedding in the noised pass, or None without noise.
    """
    site, settings = noise.site, noise.settings
    arguments, noised_first = form.inputs.arguments, settings.one_sided
    embedded: list[Embedded] = []

    def forward(arguments: dict[str, Any], *, noised: bool, half: bool = False) -> Any:
        if site is None:
            return model(**arguments)
        detach = noised and settings.detach_embedding
        with embedding_hook(site, noise if noised else None, detach=detach, half=half) as record:
            output = model(**arguments)
        if noised:
            embedded.append(record)
        return output

    if settings.passes == "doubled":
        doubled = form.inputs.doubled()
        loss, logits = form.conclude(
            lambda: forward(doubled, noised=True, half=True),
            lambda both: both.chunk(2),  # type: ignore[arg-type, return-value]
        )
    else:
        with (
            random_state_kept(model, arguments, enabled=settings.masks == "shared"),
            torch.no_grad() if noised_first else nullcontext(),
        ):
            first = form.observe(lambda: forward(arguments, noised=noised_first))
        _keep_buffers(model)
        with power_iteration_paused(model):
            loss, logits = form.conclude(
                lambda: forward(arguments, noised=not noised_first),
                lambda last: (last, first) if noised_first else (first, last),
            )
        _search_both_passes(model, loss.loss)
    _require_engine_backward(model, loss.loss, noise.objective)
    return loss, logits, embedded[0] if embedded else None


def _keep_buffers(model: nn.Module) -> None:
    """Stop DDP's next pass from broadcasting buffers again: the first pass of the step did so.

    In torch before 2.13, broadcasting again marks them as changed, and the backward of the first pass fails.
    """
    for layer in layers(model):
        if isinstance(layer, DistributedDataParallel):
            layer.require_forward_param_sync = False  # the pass itself resets it


def _search_both_passes(model: nn.Module, loss: Tensor) -> None:
    """Have DDP look for unused parameters in the graph of both passes: it has searched that of the last one.

    Otherwise one that only the first pass uses (a layer that LayerDrop leaves out of the last) counts as unused,
    and its gradient is an error.
    """
    for layer in layers(model):
        if not (isinstance(layer, DistributedDataParallel) and loss.requires_grad):
            continue
        if layer.find_unused_parameters and not layer.static_graph and layer.require_backward_grad_sync:
            layer.reducer.prepare_for_backward([loss])


def _require_engine_backward(model: nn.Module, loss: Tensor, objective: str) -> None:
    """Refuse a backward pass that a DeepSpeed engine does not run itself.

    The engine then scales and reduces gradients by hooks on the outputs of its forwards, and these expect one
    forward a step, and a loss that is made of its output.

    Raises:
        NoiseError: in the backward pass.
    """

    def check(_: Tensor) -> None:
        if not model._running_engine_backward:
            raise NoiseError(
                f"The loss of {objective} was given to loss.backward() under DeepSpeed, which then loses "
                "gradients of steps with two passes, or does not divide them by gradient_accumulation_steps; "
                "expected engine.backward(out.loss), as accelerator.backward(out.loss) calls it."
            )

    if loss.requires_grad and hasattr(model, "_running_engine_backward"):
        loss.register_hook(check)
