"""Whether noise gets into the encoder's first layer, proved once before training, and whether the loss feels it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.embedding import (
    Disturbance,
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


_LOOKS = {8: 1e-6, 128: 1e-3}
"""After how many batches of a run to look at the divergence, and the share of the task loss from which it is felt.

The share grows about a thousandfold while a new head learns (on the quick start from 4e-6 to 2e-2 at a relative
sigma of 0.5), so the first look finds what will never be felt.
"""

_AVERAGED = 8
"""Batches that a look takes the mean of."""

_FELT_SIGMA = 0.5
"""The relative sigma from which on noise was felt (divergence 2e-2 on the trained model of the quick start)."""


class ArrivalFigures(NamedTuple):
    """What became of the noise."""

    at_embedding: float
    """Noise-to-signal of the embedding output as handed on."""
    changed: float
    """Share of its entries that changed."""
    at_layer: float
    """Noise-to-signal of the first layer's input."""
    smallest_sigma: float
    """The sigma at which half of the entries would change, absolute or as a share as the settings count sigma."""


def measure_arrival(noised: Embedded, clean: list[Tensor], noisy: list[Tensor], noise: Disturbance) -> Tensor:
    """Compare what the first layers were given in a clean and a noised pass that share their dropout masks.

    Args:
        noised: record of the noised pass.
        clean: the first layers' inputs in the clean pass, from `layer_inputs`.
        noisy: the same in the noised pass.
        noise: of the noised pass.

    Returns:
        The ArrivalFigures (4,), fp32, on the model's device.
    """
    realised = measure(noised)
    smallest = smallest_surviving_sigma(noised, noise.settings.noise)
    if noise.settings.relative:
        smallest = smallest / root_mean_square(noised.clean, noise.real)
    arrived = torch.stack([noise_to_signal(*pair) for pair in zip(clean, noisy, strict=True)])
    first = arrived[(arrived > 0).int().argmax()]  # of the stacks that the noise gets to
    return torch.stack([realised.noise_to_signal, realised.changed, first, smallest.float()])


def judge_arrival(figures: ArrivalFigures, noise: Disturbance, dtype: torch.dtype) -> None:
    """Log what survives of the noise, at INFO, or refuse to train where nothing does.

    Args:
        figures: the largest of all ranks.
        noise: of the noised pass.
        dtype: type in which the embedding output is handed on.

    Raises:
        NoiseError: when the noise is lost in rounding, or never enters the network.
    """
    site, settings = noise.site, noise.settings
    assert site is not None
    smallest = figures.smallest_sigma / (site.scale if settings.before_scale else 1.0)
    if figures.changed == 0 or figures.at_layer == 0:
        first_layer = f"first layer of {type(site.encoder).__name__}"
        place = "embedding output" if figures.changed == 0 else first_layer
        raise NoiseError(
            f"Noise of sigma {settings.sigma:g} changes nothing in the {place} ({dtype}): it is lost in "
            "rounding, or the encoder ignores its embedding output. Expected a change. Half of the entries "
            f"change from about sigma={smallest:.1e} on: set that or more, use a wider type, or use "
            "swaft.TaskLoss."
        )
    if current_rank() == 0:
        logger.info(
            "%s noise, sigma %g: noise-to-signal %.2e at the embedding (%.1f%% of entries changed, handed "
            "on in %s), %.2e at the first encoder layer; the smallest sigma that survives is about %.1e",
            *(settings.noise, settings.sigma, figures.at_embedding, 100 * figures.changed, dtype),
            *(figures.at_layer, smallest),
        )


class FirstBatches:
    """What the divergence adds to the loss of a run's first batches; said once where it is not felt.

    Sums stay on the device, which is read once a look.
    """

    def __init__(self) -> None:
        self._batches, self._recent = 0, list[Tensor]()
        self._looks = dict(_LOOKS)

    def add(self, task_loss: Tensor, weighted: Tensor, settings: NoiseSettings, objective: str) -> None:
        """Add a training batch; warn where it is one to look at and the divergence is not felt.

        Args:
            task_loss: of the batch, 0-dim, detached.
            weighted: weight * divergence, 0-dim, detached.
            settings: of the objective.
            objective: its name.
        """
        if not self._looks:
            return
        self._batches += 1
        look, felt = next(iter(self._looks.items()))
        if self._batches > look - _AVERAGED:
            self._recent.append(torch.stack([task_loss, weighted]))
        if self._batches < look:
            return
        task, added = torch.stack(self._recent).mean(0).tolist()
        del self._looks[look]
        self._recent.clear()
        if not added < felt * task:  # nor what is not a number
            return
        self._looks.clear()
        if current_rank() == 0:
            logger.warning(
                "%s is not felt: after %d batches weight x divergence is %.1e beside a task loss of %.2g%s. Below "
                "one thousandth of it training is that without noise, at twice the cost. Set %s",
                *(objective, look, added, task, "; the two passes are the same" if added == 0 else ""),
                _felt_settings(settings),
            )


def _felt_settings(settings: NoiseSettings) -> str:
    if settings.masks == "shared":
        ways = ["masks='independent' (dropout then differs between the passes)"]
    else:
        ways = ["more dropout in the model"]
    if settings.sigma > 0:
        sigma = 2 * settings.sigma if settings.relative and settings.sigma >= _FELT_SIGMA else _FELT_SIGMA
        ways.append(f"preset='relative' with sigma={sigma:g} or more")
    return ", ".join([*ways, "or a larger weight."])


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
def layer_inputs(site: EmbeddingSite) -> Iterator[list[Tensor]]:
    """Catch what the first layer that runs of each stack of an encoder is given in a pass.

    Yields:
        A list that holds it, stack by stack as they run, when the pass has run. The first need not be the layers
        that text goes through: embeddings may be made of several tables (MarkupLM).
    """
    seen: dict[nn.ModuleList, Tensor] = {}

    def catch(stack: nn.ModuleList) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if stack not in seen and tensors:
                seen[stack] = tensors[0].detach().clone()

        return hook

    # Some call the forward of a layer past its hooks (SqueezeBERT), so its parts are watched as well.
    handles = [
        module.register_forward_pre_hook(catch(stack), with_kwargs=True)
        for stack in _stacks(site.encoder)
        for layer in stack
        for module in layer.modules()
    ]
    inputs: list[Tensor] = []
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    inputs += seen.values()
    if not inputs:
        raise NoiseError(
            f"No layer of {type(site.encoder).__name__} ran in a forward pass; expected a torch.nn.ModuleList of "
            "layers, so that the noise can be followed there. Use swaft.RDrop or swaft.TaskLoss."
        )


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules that lie in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)
