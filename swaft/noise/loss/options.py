"""What the noise-stability loss can be asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from swaft.errors import ConfigError

Detach = Literal["none", "clean", "noised", "target"]
"""What the divergence holds constant in its gradient: nothing; one pass; the first argument of each KL."""

Form = Literal["difference", "direct"]
"""How the noised logits come about.

With "difference" z - z' is not a subtraction of logits but a product of its own, h - h' times the weight, and has
its digits at every size of noise, also with 16-bit operands; with bf16 operands it serves spreads of z - z' up to
about 2. "direct" takes z' from the head of h' itself: right where the passes are far apart (R-Drop, independent
dropout masks), with bf16 operands from a spread of about 0.05 on.
"""

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
    divergence_weight: float = 1.0
    """lambda, the factor on the divergence."""

    @property
    def noised_moves(self) -> bool:
        """Whether the loss has a gradient in the noised pass."""
        return self.detach != "noised" or self.ce_on_noised

    def __post_init__(self) -> None:
        problems = [
            *one_of("detach", self.detach, get_args(Detach)),
            *one_of("form", self.form, get_args(Form)),
            *one_of("ce_on_noised", self.ce_on_noised, (False, True)),
            *number_problems("label_smoothing", self.label_smoothing, "from 0 to 1", lambda s: 0 <= s <= 1),
            *number_problems("z_loss", self.z_loss, "0 or more", lambda k: k >= 0),
            *number_problems("divergence_weight", self.divergence_weight, "0 or more", lambda w: w >= 0),
            *number_problems("logit_scale", self.logit_scale, "more than 0", lambda a: a > 0),
        ]
        if self.softcap is not None:
            problems += number_problems("softcap", self.softcap, "more than 0, or None", lambda k: k > 0)
        if problems:
            raise ConfigError(problems)


def one_of(name: str, value: object, choices: tuple[object, ...]) -> list[str]:
    """The problem of a value that is none of the choices, if it is one."""
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
