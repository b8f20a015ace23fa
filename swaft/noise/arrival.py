"""The proof, made once before training, that noise on the embeddings gets into the encoder's first layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.dropout import RngState
from swaft.noise.embedding import (
    Embedded,
    EmbeddingSite,
    embedding_hook,
    measure,
    noise_to_signal,
    root_mean_square,
)
from swaft.noise.generator import Noise
from swaft.noise.presets import NoiseSettings
from swaft.noise.wrappers import current_rank, is_distributed

logger = logging.getLogger(__name__)

_CHANGES_HALF = {"uniform": 1.0, "normal": 0.5 / 0.6745}
"""Sigma, in units in the last place of an entry, at which adding noise changes it with probability 1/2."""


def prove_arrival(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    site: EmbeddingSite,
    draw: Callable[[Tensor], Tensor],
    settings: NoiseSettings,
) -> None:
    """Compare the first encoder layer's input in a clean and a noised pass that share their dropout masks.

    Two forward passes without gradient; every rank must make them. Random state, buffers and the training
    mode are left as found. What survives of the noise is logged once, at INFO.

    Args:
        model: the model as wrapped by the training engine.
        batch: keyword arguments of its forward.
        site: where the noise goes in.
        draw: gives the noise for an embedding output.
        settings: noise and sigma (greater than 0) of the objective.

    Raises:
        NoiseError: when the noise is lost in rounding, or never enters the network; on all ranks alike.
    """
    rng = RngState.capture(model)
    with torch.no_grad(), _buffers_restored(model):
        _, clean_input = _first_layer_input(model, batch, site, draw=None)
        rng.restore()
        noised, noised_input = _first_layer_input(model, batch, site, draw=draw)
        rng.restore()
        # Weights that autocast cast here carry no gradient and must not serve the training pass.
        torch.clear_autocast_cache()

        realised = measure(noised)
        arrived = noise_to_signal(clean_input, noised_input)
        smallest = smallest_surviving_sigma(noised, settings.noise)
        if settings.relative:
            smallest = smallest / root_mean_square(noised.clean)
        figures = torch.stack([realised.noise_to_signal, realised.changed, arrived, smallest.float()])
        at_embedding, changed, at_layer, smallest_sigma = _largest_over_ranks(figures).tolist()

    dtype = noised.handed_on.dtype
    if changed == 0 or at_layer == 0:
        place = "embedding output" if changed == 0 else f"first layer of {type(site.encoder).__name__}"
        raise NoiseError(
            f"Noise of sigma {settings.sigma:g} changes nothing in the {place} ({dtype}): it is lost in "
            "rounding, or the encoder ignores its embedding output. Expected a change. Half of the entries "
            f"change from about noise.sigma={smallest_sigma:.1e} on: set noise.sigma, use a wider type, or "
            "set noise.kind=none."
        )
    if current_rank() == 0:
        logger.info(
            "%s noise, sigma %g: noise-to-signal %.2e at the embedding (%.1f%% of entries changed, handed "
            "on in %s), %.2e at the first encoder layer; the smallest sigma that survives is about %.1e",
            *(settings.noise, settings.sigma, at_embedding, 100 * changed, dtype, at_layer, smallest_sigma),
        )


def smallest_surviving_sigma(record: Embedded, noise: Noise) -> Tensor:
    """Estimate the sigma at which half of an embedding output's entries change in the type handed on.

    An entry changes when the noise passes half its unit in the last place, eps * 2**floor(log2 |x|). For
    uniform noise that happens with probability 1/2 at sigma = one unit, for normal noise at 0.74 units; the
    estimate takes the median entry. Entries that are 0 (padding) are left out.

    Returns:
        A 0-dim tensor; 0 when every entry is 0.
    """
    exponents = record.clean[record.clean != 0].abs().float().log2().floor()
    if exponents.numel() == 0:
        return record.clean.new_zeros(())
    ulp = torch.finfo(record.handed_on.dtype).eps * torch.exp2(exponents)
    return ulp.median() * _CHANGES_HALF[noise]


def _first_layer_input(
    model: nn.Module, batch: dict[str, Any], site: EmbeddingSite, draw: Callable[[Tensor], Tensor] | None
) -> tuple[Embedded, Tensor]:
    """Run one pass and catch what the first encoder layer that runs is given."""
    seen: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not seen and tensors:
            seen.append(tensors[0].detach().clone())

    handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in _blocks(site.encoder)]
    try:
        with embedding_hook(site, draw) as record:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NoiseError(
            f"No layer of {type(site.encoder).__name__} ran in a forward pass; expected its first "
            "torch.nn.ModuleList to hold the layers, so that the noise can be followed there. "
            "Set noise.kind=rdrop or none."
        )
    return record, seen[0]


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) > 0)
    return list(next(lists, nn.ModuleList()))


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
