"""What is proved once, before training: that the loss is the model's own, and that the noise gets into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.arrival import ArrivalFigures, judge_arrival, layer_inputs, measure_arrival
from swaft.noise.checks import check_rows, check_seeds, generates, router_terms
from swaft.noise.embedding import Disturbance, embedding_hook
from swaft.noise.head import LanguageModelHead, placeholder
from swaft.noise.inputs import (
    IGNORE_INDEX,
    prepare_inputs,
    proof_rows,
    real_tokens,
    task_logits,
    without_cache,
)
from swaft.noise.passes import RngState
from swaft.noise.wrappers import is_distributed

_ROWS = 2
"""Rows of a batch that a generating model's proof is made on: its logits are too large for all."""

_ROUTER_LOSSES = ("aux_loss", "z_loss")
"""How the names of a mixture of experts' own losses end in a Hugging Face model's output."""

_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 2e-2
"""How far two computations of one number may be apart, relative; the second where the model rounds to 16 bits."""


def prove(
    model: nn.Module, batch: dict[str, Any], noise: Disturbance, *, head: LanguageModelHead | None
) -> bool:
    """Hold the model's own loss, its logits and its first layer to what the objective takes them for.

    One clean pass with labels and, where there is noise, one noised pass with the same dropout masks; both without
    gradient, on one or two rows where the model generates. Every rank must make them. Random state, buffers and
    the training mode are left as found.

    Args:
        model: the model as wrapped by the training engine.
        batch: keyword arguments of its forward, labels included.
        noise: of the step, and the objective's settings.
        head: the head that the fused loss computes with; None where the loss is computed from logits.

    Returns:
        Whether the loss could be compared: False where no rank's batch has rows of more than one class, in whose
        mean cross entropy weights of classes would show.

    Raises:
        NoiseError: when the model trains another loss than the mean cross entropy, when its logits are not what the
            head is taken to make, or when the noise does not arrive; on all ranks alike.
    """
    rows = proof_rows(model, batch, at_most=_ROWS) if generates(model) else batch
    inputs = prepare_inputs(model, rows)
    noise = replace(noise, real=real_tokens(inputs.arguments))
    site, settings, objective = noise.site, noise.settings, noise.objective
    rng, seed = RngState.capture(model, batch), torch.initial_seed()
    with torch.no_grad(), _buffers_restored(model):
        with layer_inputs(site) if site else nullcontext([]) as clean:
            loss_figures = _clean_pass(model, rows, noise, head)
        if settings.masks == "shared":
            check_seeds(model, reseeded=torch.initial_seed() != seed)
        rng.restore()
        arrival, handed_on = torch.zeros(4, device=loss_figures.device), torch.float32
        if site is not None:
            with (
                layer_inputs(site) as noisy,
                embedding_hook(site, noise) as noised,
                head.replaced(placeholder) if head else nullcontext(),
            ):
                model(**inputs.arguments)
            arrival = measure_arrival(noised, clean, noisy, noise)
            handed_on = noised.handed_on.dtype
            rng.restore()
        # Weights that autocast cast here carry no gradient and must not serve the training pass.
        torch.clear_autocast_cache()

    figures = _largest_over_ranks(torch.cat([loss_figures, arrival])).tolist()
    compared, loss_gap, logits_gap, *arrived = figures
    if loss_gap > 1:
        raise NoiseError(
            f"{objective} computes the mean cross entropy of the counted rows, and the model's own loss is "
            "another one (weighted, smoothed, with more terms, or of other rows), which would be replaced. "
            "Expected a model whose loss is the mean cross entropy. Use swaft.TaskLoss."
        )
    if head is not None and logits_gap > 1:
        raise NoiseError(
            f"The model does more to its logits after the head than is known (logit scale {head.logit_scale:g}, "
            f"soft-cap {head.softcap}, {'no' if head.logits_bias is None else 'a'} bias); expected nothing more. "
            "Set fused=False, which computes the loss from the logits of both passes."
        )
    if site is not None:
        judge_arrival(ArrivalFigures(*arrived), noise, handed_on)
    return compared > 0


def _clean_pass(
    model: nn.Module, rows: dict[str, Any], noise: Disturbance, head: LanguageModelHead | None
) -> Tensor:
    """Run the model with labels, its own head and its own loss.

    Returns:
        (3,) fp32: 1 where the loss can be compared, and how far the loss and the logits are from what they are
        taken to be, as multiples of the tolerance.
    """
    outputs: list[Tensor] = []

    def watched(hidden: Tensor) -> Tensor:
        assert head is not None
        head.loss_arguments()  # refuses a weight that the fused loss cannot take
        outputs.append(nn.Linear.forward(head.linear, hidden))
        return outputs[-1]

    with (
        embedding_hook(noise.site) if noise.site else nullcontext(),
        head.replaced(watched) if head else nullcontext(),
    ):
        output = model(**without_cache(model, rows))
    _check_output(output, noise.objective)
    targets = prepare_inputs(model, rows).targets
    logits = task_logits(output)
    check_rows(logits, targets, noise.objective)

    dtypes = {parameter.dtype for parameter in model.parameters()} | {each.dtype for each in outputs}
    rounds = any(dtype.itemsize < 4 for dtype in dtypes if dtype.is_floating_point)
    tolerance = _TOLERANCE_16_BIT if rounds else _TOLERANCE
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX)
    loss_gap = (output.loss - expected).abs() / (1 + expected.abs())
    logits_gap = torch.zeros_like(loss_gap)
    if head is not None:
        transformed = head.transform(outputs[-1])
        logits_gap = (logits - transformed).abs().amax() / transformed.abs().amax()
    counted = targets[targets != IGNORE_INDEX]
    # Weights of the classes cancel in the mean where there is one class; a batch of one row has no more.
    compared = (counted != counted[:1]).any() | (targets.numel() == 1)
    # A loss or logits that are not numbers are for the training loop to find; no row that counts gives none.
    gaps = torch.stack([loss_gap, logits_gap]).nan_to_num(nan=0.0) / tolerance
    return torch.cat([compared.float().reshape(1), gaps.float()])


def _check_output(output: Any, objective: str) -> None:
    """Refuse an output without loss and logits, and one whose loss has terms of a mixture of experts.

    Args:
        output: what the model returned for a batch with labels.
        objective: the objective's name, for the message.

    Raises:
        NoiseError: naming what was found.
    """
    if not isinstance(task_logits(output), Tensor) or getattr(output, "loss", None) is None:
        raise NoiseError(
            f"The model's output, {type(output).__name__}, lacks .loss or .logits, which {objective} needs; "
            "expected a Hugging Face model that classifies, points at answers or generates. Use swaft.TaskLoss."
        )
    # Such a term may be too small beside the cross entropy to show in the loss.
    terms = [
        name for name, value in vars(output).items() if name.endswith(_ROUTER_LOSSES) and value is not None
    ]
    if terms:
        raise router_terms(", ".join(terms), objective)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes do to buffers (running statistics, the vectors of a power iteration)."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _largest_over_ranks(figures: Tensor) -> Tensor:
    """Agree on the figures, so that all ranks continue or none does."""
    if is_distributed():
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return figures
