"""What the noise-stability loss can be asked for, and the checks of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from swaft.errors import ConfigError

Detach = Literal["none", "clean", "noised", "target"]
"""What the divergence holds constant in its gradient: nothing; one pass; the first argument of each KL."""

Form = Literal["difference", "direct"]
"""How the noised logits come about: clean ones less the head of h - h', or the head of h' itself."""

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LossOptions:
    """What the rows of a loss have in common.

    Raises:
        ConfigError: naming every value out of range.
    """

    label_smoothing: float = 0.0
    """Share s of the target spread over all V classes; cross entropy only."""
    z_loss: float = 0.0
    """Weight k of k L^2, L the logarithm of the softmax normalizer."""
    detach: Detach = "none"
    """See ``Detach``."""
    ce_on_noised: bool = False
    """Average the cross entropies (and z terms) of both passes (R-Drop) instead of taking the clean one's."""
    logit_scale: float = 1.0
    """alpha in raw = alpha h W^T + b (T5 with tied embeddings: d^-1/2)."""
    softcap: float | None = None
    """kappa in z = kappa tanh(raw / kappa); None: z = raw."""
    form: Form = "difference"
    """See ``Form``."""

    @property
    def noised_moves(self) -> bool:
        """Whether the loss has a gradient in the noised pass."""
        return self.detach != "noised" or self.ce_on_noised

    def __post_init__(self) -> None:
        problems = [
            *_one_of("detach", self.detach, get_args(Detach)),
            *_one_of("form", self.form, get_args(Form)),
            *_one_of("ce_on_noised", self.ce_on_noised, (False, True)),
            *number_problems("label_smoothing", self.label_smoothing, "from 0 to 1", lambda s: 0 <= s <= 1),
            *number_problems("z_loss", self.z_loss, "0 or more", lambda k: k >= 0),
            *number_problems("logit_scale", self.logit_scale, "more than 0", lambda a: a > 0),
        ]
        if self.softcap is not None:
            problems += number_problems("softcap", self.softcap, "more than 0, or None", lambda k: k > 0)
        if problems:
            raise ConfigError(problems)


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction.

    Raises:
        ConfigError: for anything but "mean" and "sum".
    """
    if problems := _one_of("reduction", reduction, get_args(Reduction)):
        raise ConfigError(problems)


def check_divergence_weight(weight: float) -> None:
    """Refuse a weight that no divergence can have.

    Raises:
        ConfigError: for a number that is negative or not finite.
    """
    if problems := number_problems("divergence_weight", weight, "0 or more", lambda w: w >= 0):
        raise ConfigError(problems)


def check_detach(detach: str) -> None:
    """Refuse an unknown choice of what is held constant.

    Raises:
        ConfigError: for anything but the values of ``Detach``.
    """
    if problems := _one_of("detach", detach, get_args(Detach)):
        raise ConfigError(problems)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> list[str]:
    if value in choices:
        return []
    return [f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."]


def number_problems(name: str, value: float, expected: str, accepts: Callable[[float], bool]) -> list[str]:
    """The problem of a number that is not finite or not accepted, if it is one.

    Finite is asked by comparing, for torch.compile follows that with a number it does not hold constant.
    """
    if isinstance(value, (int, float)) and -math.inf < value < math.inf and accepts(value):
        return []
    return [f"{name} is {value!r}; expected a finite number, {expected}."]
