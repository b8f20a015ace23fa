"""The published variants of the noise-stability objective as a table, and settings read off it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from swaft.errors import ConfigError
from swaft.noise.generator import Noise
from swaft.noise.loss import Detach

Masks = Literal["shared", "independent"]
Reduction = Literal["mean", "batchmean"]
Passes = Literal["two", "doubled"]


@dataclass(frozen=True)
class NoiseSettings:
    """Everything that tells one noise-stability objective from another."""

    noise: Noise = "uniform"
    """Distribution of the noise on the encoder's token embeddings."""
    sigma: float = 1e-5
    """Half width (uniform) or standard deviation (normal) of the noise; 0 for none."""
    relative: bool = False
    """Whether sigma is a share of the root mean square of the embedding output."""
    before_scale: bool = False
    """Whether sigma is the size before a factor that the embedding itself applies (mBART: the root of d)."""
    masks: Masks = "shared"
    """Whether the two passes draw the same dropout masks."""
    reduction: Reduction = "mean"
    """"mean": over the rows whose label counts; "batchmean": sum over all rows, padding too, by sentences."""
    scale: float = 1.0
    """Factor on the reduced divergence, before the weight."""
    detach: Detach = "none"
    """What the divergence holds constant in its gradient."""
    detach_embedding: bool = False
    """Whether the noised pass sends no gradient into the token embeddings."""
    ce_on_noised: bool = False
    """Whether the task loss is the average of both passes' instead of the clean one's."""
    task_scale: float = 1.0
    """Factor on the task loss; 2 makes of the average of both passes' their sum."""
    passes: Passes = "two"
    """"two": one after the other; "doubled": one pass over the batch twice, its second half noised."""
    fused: bool = True
    """Whether a generating model's loss is computed from its hidden states, so that no logits are made."""
    label_smoothing: float = 0.0
    """Share of the target of the task loss that is spread over all classes."""

    @property
    def one_sided(self) -> bool:
        """Whether nothing needs a gradient of the noised pass."""
        return self.detach == "noised" and not self.ce_on_noised


_PAPER = NoiseSettings()
_RELATIVE = NoiseSettings(sigma=0.01, relative=True)
_FAIRSEQ = NoiseSettings(masks="independent", reduction="batchmean", before_scale=True)
_RDROP = NoiseSettings(sigma=0.0, masks="independent", scale=0.5, ce_on_noised=True)
_RDROP_PAPER = replace(_RDROP, task_scale=2.0)

PRESETS: dict[str, tuple[NoiseSettings, NoiseSettings]] = {
    "paper": (_PAPER, _PAPER),
    "relative": (_RELATIVE, _RELATIVE),
    "fairseq": (replace(_FAIRSEQ, detach_embedding=True), replace(_FAIRSEQ, noise="normal")),
    "rdrop": (_RDROP, _RDROP),
    "rdrop_paper": (_RDROP_PAPER, _RDROP_PAPER),
}
"""Settings of each preset for models that classify, and for those that generate.

paper: Aghajanyan et al. 2021, eqs. 3-4. relative: the same, the noise measured against the embeddings.
fairseq: what the authors' released code asks for (examples/rxf); there the noise never reached RoBERTa, here
it does. rdrop: Liang et al. 2021, which needs dropout and no noise, as their released text code has it, the cross
entropies of both passes averaged; rdrop_paper: their equation 4, the cross entropies summed.
"""

_CHOICES: dict[str, tuple[object, ...]] = {
    "noise": get_args(Noise),
    "masks": get_args(Masks),
    "reduction": get_args(Reduction),
    "detach": get_args(Detach),
    "passes": get_args(Passes),
    "fused": (False, True),
}


def resolve_settings(preset: str | None, *, generates: bool, **overrides: Any) -> NoiseSettings:
    """Read a preset's settings off the table and put explicit values over them.

    Args:
        preset: a key of PRESETS; None for "paper".
        generates: whether the model generates text rather than classifies.
        overrides: fields of NoiseSettings; None keeps the preset's value.

    Raises:
        ConfigError: naming every invalid value and what is allowed.
    """
    name = "paper" if preset is None else preset
    given = {field: value for field, value in overrides.items() if value is not None}
    problems = [
        f"noise.{field} is {given[field]!r}; expected one of {', '.join(map(str, choices))}."
        for field, choices in _CHOICES.items()
        if field in given and given[field] not in choices
    ]
    if name not in PRESETS:
        problems.append(f"noise.preset is {preset!r}; expected one of {', '.join(PRESETS)}.")
    sigma = given.get("sigma", 0.0)
    if not is_finite_and_not_negative(sigma):
        problems.append(f"noise.sigma is {sigma!r}; expected a finite number, 0 or more.")
    smoothing = given.get("label_smoothing", 0.0)
    if not is_finite_and_not_negative(smoothing) or smoothing >= 1:
        problems.append(f"label_smoothing is {smoothing!r}; expected a number from 0 to below 1.")
    if problems:
        raise ConfigError(problems)
    settings = replace(PRESETS[name][generates], **given)
    if settings.passes == "doubled" and settings.one_sided:
        raise ConfigError(
            "noise.passes=doubled with noise.detach=noised: a noised pass without gradient has to be a pass of "
            "its own; expected noise.passes=two, or another noise.detach."
        )
    if settings.sigma == 0 and settings.masks == "shared":
        raise ConfigError(
            "noise.sigma=0 with noise.masks=shared: nothing differs between the two passes, so the divergence is 0 "
            "at twice the time. Set noise.sigma, noise.masks=independent, or noise.kind=none."
        )
    return settings


def is_finite_and_not_negative(value: Any) -> bool:
    """Whether a value is a number that a weight or a noise size can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
