"""The proof, made once before training, that noise on the embeddings gets into the encoder's first layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.embedding import (
    Embedded,
    EmbeddingSite,
    measure,
    noise_to_signal,
    root_mean_square,
)
from swaft.noise.generator import Noise
from swaft.noise.presets import NoiseSettings
from swaft.noise.wrappers import current_rank

logger = logging.getLogger(__name__)

_CHANGES_HALF = {"uniform": 1.0, "normal": 0.5 / 0.6745}
"""Sigma, in units in the last place of an entry, at which adding noise changes it with probability 1/2."""


class ArrivalFigures(NamedTuple):
    """What became of the noise."""

    at_embedding: float
    """Noise-to-signal of the embedding output as handed on."""
    changed: float
    """Share of its entries that changed."""
    at_layer: float
    """Noise-to-signal of the first layer's input."""
    smallest_sigma: float
    """The sigma at which half of the entries would change, as the settings count sigma."""


def measure_arrival(
    noised: Embedded, clean_input: Tensor, noised_input: Tensor, settings: NoiseSettings
) -> Tensor:
    """Compare what the first layer was given in a clean and a noised pass that share their dropout masks.

    Args:
        noised: record of the noised pass.
        clean_input: the first layer's input in the clean pass.
        noised_input: the same in the noised pass.
        settings: noise and sigma (greater than 0) of the objective.

    Returns:
        The ArrivalFigures (4,), fp32, on the model's device.
    """
    realised = measure(noised)
    smallest = smallest_surviving_sigma(noised, settings.noise)
    if settings.relative:
        smallest = smallest / root_mean_square(noised.clean)
    arrived = noise_to_signal(clean_input, noised_input)
    return torch.stack([realised.noise_to_signal, realised.changed, arrived, smallest.float()])


def judge_arrival(
    figures: ArrivalFigures, *, site: EmbeddingSite, dtype: torch.dtype, settings: NoiseSettings
) -> None:
    """Log what survives of the noise, at INFO, or refuse to train where nothing does.

    Args:
        figures: the largest of all ranks.
        site: where the noise goes in.
        dtype: type in which the embedding output is handed on.
        settings: noise and sigma of the objective.

    Raises:
        NoiseError: when the noise is lost in rounding, or never enters the network.
    """
    if figures.changed == 0 or figures.at_layer == 0:
        first_layer = f"first layer of {type(site.encoder).__name__}"
        place = "embedding output" if figures.changed == 0 else first_layer
        raise NoiseError(
            f"Noise of sigma {settings.sigma:g} changes nothing in the {place} ({dtype}): it is lost in "
            "rounding, or the encoder ignores its embedding output. Expected a change. Half of the entries "
            f"change from about noise.sigma={figures.smallest_sigma:.1e} on: set noise.sigma, use a wider type, or "
            "set noise.kind=none."
        )
    if current_rank() == 0:
        logger.info(
            "%s noise, sigma %g: noise-to-signal %.2e at the embedding (%.1f%% of entries changed, handed "
            "on in %s), %.2e at the first encoder layer; the smallest sigma that survives is about %.1e",
            *(settings.noise, settings.sigma, figures.at_embedding, 100 * figures.changed, dtype),
            *(figures.at_layer, figures.smallest_sigma),
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


@contextmanager
def first_layer_input(site: EmbeddingSite) -> Iterator[list[Tensor]]:
    """Catch what the first encoder layer that runs in a pass is given.

    Yields:
        A list that holds it when the pass has run.
    """
    seen: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not seen and tensors:
            seen.append(tensors[0].detach().clone())

    handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in _layers(site)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NoiseError(
            f"No layer of {type(site.encoder).__name__} ran in a forward pass; expected the first "
            "torch.nn.ModuleList beside its embedding to hold the layers, so that the noise can be followed there. "
            "Set noise.kind=rdrop or none."
        )


def _layers(site: EmbeddingSite) -> list[nn.Module]:
    """The first list of modules in the innermost stack that has the embedding; others may hold a vision tower."""
    found = nn.ModuleList()
    for stack in site.encoder.modules():  # from the outside in
        if any(module is site.embedding for module in stack.modules()):
            lists = (each for each in stack.modules() if isinstance(each, nn.ModuleList) and len(each) > 0)
            found = next(lists, found)
    return list(found)
