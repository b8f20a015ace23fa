"""What is proved once, before training: that the loss is the model's own, and that the noise gets into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.arrival import ArrivalFigures, judge_arrival, layer_inputs, measure_arrival
from swaft.noise.checks import check_output, check_rows, check_seeds, generates
from swaft.noise.dropout import RngState
from swaft.noise.embedding import EmbeddingSite, embedding_hook
from swaft.noise.head import LanguageModelHead, placeholder
from swaft.noise.inputs import IGNORE_INDEX, prepare_inputs, proof_rows
from swaft.noise.outputs import task_logits
from swaft.noise.presets import NoiseSettings
from swaft.noise.wrappers import is_distributed

_ROWS = 2
"""Rows of a batch that a generating model's proof is made on: its logits are too large for all."""

_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 2e-2
"""How far two computations of one number may be apart, relative; the second where the model rounds to 16 bits."""


def prove(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    site: EmbeddingSite | None,
    head: LanguageModelHead | None,
    disturb: Callable[[Tensor], Tensor],
    settings: NoiseSettings,
    objective: str,
) -> bool:
    """Hold the model's own loss, its logits and its first layer to what the objective takes them for.

    One clean pass with labels and, where there is noise, one noised pass with the same dropout masks; both without
    gradient, on one or two rows where the model generates. Every rank must make them. Random state, buffers and
    the training mode are left as found.

    Args:
        model: the model as wrapped by the training engine.
        batch: keyword arguments of its forward, labels included.
        site: where the noise goes in; None where there is none.
        head: the head that the fused loss computes with; None where the loss is computed from logits.
        disturb: gives the sum of an embedding output and noise.
        settings: the objective's.
        objective: its name, for messages.

    Returns:
        Whether the loss could be compared: False where no rank's batch has rows of more than one class, in whose
        mean cross entropy weights of classes would show.

    Raises:
        NoiseError: when the model trains another loss than the mean cross entropy, when its logits are not what the
            head is taken to make, or when the noise does not arrive; on all ranks alike.
    """
    rows = proof_rows(model, batch, at_most=_ROWS) if generates(model) else batch
    rng, seed = RngState.capture(model), torch.initial_seed()
    with torch.no_grad(), _buffers_restored(model):
        with layer_inputs(site) if site else nullcontext([]) as clean:
            loss_figures = _clean_pass(model, rows, site, head, objective)
        if settings.masks == "shared":
            check_seeds(model, reseeded=torch.initial_seed() != seed)
        rng.restore()
        arrival, handed_on = torch.zeros(4, device=loss_figures.device), torch.float32
        if site is not None:
            inputs = prepare_inputs(model, rows)
            with (
                layer_inputs(site) as noisy,
                embedding_hook(site, disturb) as noised,
                head.replaced(placeholder) if head else nullcontext(),
            ):
                model(**inputs.arguments)
            arrival = measure_arrival(noised, clean, noisy, settings)
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
            "Expected a model whose loss is the mean cross entropy. Set noise.kind=none."
        )
    if head is not None and logits_gap > 1:
        raise NoiseError(
            f"The model does more to its logits after the head than is known (logit scale {head.logit_scale:g}, "
            f"soft-cap {head.softcap}, {'no' if head.logits_bias is None else 'a'} bias); expected nothing more. "
            "Set noise.fused=false, which computes the loss from the logits of both passes."
        )
    if site is not None:
        judge_arrival(ArrivalFigures(*arrived), site=site, dtype=handed_on, settings=settings)
    return compared > 0


def _clean_pass(
    model: nn.Module,
    rows: dict[str, Any],
    site: EmbeddingSite | None,
    head: LanguageModelHead | None,
    objective: str,
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
        embedding_hook(site) if site else nullcontext(),
        head.replaced(watched) if head else nullcontext(),
    ):
        output = model(**rows)
    check_output(output, objective)
    targets = prepare_inputs(model, rows).targets
    logits = task_logits(output)
    check_rows(logits, targets, objective)

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
    """Agree on the figures, so that all ranks go on or none does."""
    if is_distributed():
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return figures
