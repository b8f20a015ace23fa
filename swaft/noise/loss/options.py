"""The options of the noise-stability loss, and the checks made before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from swaft.errors import ConfigError

Detach = Literal["none", "clean", "noised", "target"]
"""What the divergence treats as constant in its gradient: nothing; one pass; the first argument of each KL."""

Form = Literal["difference", "direct"]
"""How the noised logits are computed.

With "difference", z - z' is not a subtraction of logits but a separate product, h - h' times the weight. It is
accurate at every size of noise, also with 16-bit operands; with bf16 operands, it works for spreads of z - z' up to
about 2. "direct" computes z' as the head of h' itself. It is right if the passes are far apart (R-Drop, independent
dropout masks); with bf16 operands, from a spread of about 0.05.
"""

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LossOptions:
    """The options of a loss: first those common to all rows, then those that say how much each row counts.

    Raises:
        ConfigError: names every value out of range.
    """

    label_smoothing: float = 0.0
    """Share s of the target spread over all V classes; cross entropy only."""
    z_loss: float = 0.0
    """Weight k of k L^2, L the logarithm of the softmax normalizer."""
    detach: Detach = "none"
    """See ``Detach``."""
    ce_on_noised: bool = False
    """Average the cross entropies (and z terms) of both passes (R-Drop) instead of using only the clean one."""
    logit_scale: float = 1.0
    """alpha in raw = alpha h W^T + b (T5 with tied embeddings: d^-1/2)."""
    softcap: float | None = None
    """kappa in z = kappa tanh(raw / kappa); None: z = raw."""
    form: Form = "difference"
    """See ``Form``."""
    divergence_weight: float = 1.0
    """lambda, the factor on the divergence."""
    ignore_index: int = -100
    """Label of the rows that do not count."""
    token_weight: Tensor | None = None
    """Factor of each row (...), 0 or more in rows that count, None for 1. If the host cannot check it, a negative
    factor makes the loss NaN; so does a negative ``kl_normalizer``."""
    kl_mask: Tensor | None = None
    """Rows of the divergence (...), bool; None for the rows whose label counts."""
    kl_normalizer: float | Tensor | None = None
    """What the sum of the divergences is divided by; None for the sum of their weights (reduction "mean") or 1."""
    reduction: Reduction = "mean"
    """"mean" divides the cross entropy by the sum of its weights; "sum" does not divide."""

    @property
    def noised_moves(self) -> bool:
        """Whether the loss has a gradient through the noised pass."""
        return self.detach != "noised" or self.ce_on_noised

    def __post_init__(self) -> None:
        problems = [
            *_one_of("detach", self.detach, get_args(Detach)),
            *_one_of("form", self.form, get_args(Form)),
            *_one_of("ce_on_noised", self.ce_on_noised, (False, True)),
            *_one_of("reduction", self.reduction, get_args(Reduction)),
            *number_problems("label_smoothing", self.label_smoothing, "from 0 to 1", lambda s: 0 <= s <= 1),
            *number_problems("z_loss", self.z_loss, "0 or more", lambda k: k >= 0),
            *number_problems("divergence_weight", self.divergence_weight, "0 or more", lambda w: w >= 0),
            *number_problems("logit_scale", self.logit_scale, "more than 0", lambda a: a > 0),
        ]
        if self.softcap is not None:
            problems += number_problems("softcap", self.softcap, "more than 0, or None", lambda k: k > 0)
        if problems:
            raise ConfigError(problems)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> list[str]:
    """The problem if a value is not one of the choices; otherwise an empty list."""
    if value in choices:
        return []
    return [f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."]


def number_problems(name: str, value: float, expected: str, accepts: Callable[[float], bool]) -> list[str]:
    """The problem if a number is not finite or not accepted; otherwise an empty list.

    Finiteness is tested by comparison, because torch.compile can trace that for numbers it does not treat as
    constant.
    """
    if isinstance(value, (int, float)) and -math.inf < value < math.inf and accepts(value):
        return []
    return [f"{name} is {value!r}; expected a finite number, {expected}."]


def check_logits(logits: Tensor, noised_logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuse logits that do not match each other, and labels that do not match the logits.

    Raises:
        ConfigError: names every problem.
    """
    problems = _not_floating(logits=logits, noised_logits=noised_logits)
    problems += elsewhere("logits", logits, noised_logits=noised_logits, labels=labels)
    if logits.dim() == 0 or logits.shape[-1] == 0 or noised_logits.shape != logits.shape:
        problems.append(
            f"logits {tuple(logits.shape)} and noised_logits {tuple(noised_logits.shape)} do not fit; "
            "expected (..., V) twice, V at least 1."
        )
    elif labels is not None and labels.shape != logits.shape[:-1]:
        problems.append(f"labels has shape {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}.")
    if problems:
        raise ConfigError(problems)


def check_head(
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    labels: Tensor,
    form: Form,
    **counts: int | None,
) -> None:
    """Refuse operands of a head that do not fit together, and invalid counts.

    Args:
        operands: hidden states, noised ones, weight, bias and hidden difference.
        labels: of the rows.
        form: of the noised logits.
        counts: "num_counted" and "chunk_bytes".

    Raises:
        ConfigError: names every problem.
    """
    hidden, noised_hidden, weight, bias, hidden_difference = operands
    names = ("hidden", "noised_hidden", "weight", "bias", "hidden_difference")
    named = dict(zip(names, operands, strict=True))
    problems = _not_floating(**named) + elsewhere("hidden", hidden, labels=labels, **named)
    width = hidden.shape[-1] if hidden.dim() else "d"
    if hidden.dim() == 0 or noised_hidden.shape != hidden.shape or labels.shape != hidden.shape[:-1]:
        problems.append(
            f"hidden {tuple(hidden.shape)}, noised_hidden {tuple(noised_hidden.shape)} and labels "
            f"{tuple(labels.shape)} do not fit; expected (..., d) twice and (...)."
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        problems.append(f"weight has shape {tuple(weight.shape)}; expected (V, {width}), V at least 1.")
    elif bias is not None and bias.shape != weight.shape[:1]:
        problems.append(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},).")
    if hidden_difference is not None:
        if form == "direct":
            problems.append(
                "hidden_difference was given with form='direct', which does not use it; expected None. "
                "Leave it out, or set form='difference'."
            )
        elif hidden_difference.shape != hidden.shape:
            problems.append(
                f"hidden_difference has shape {tuple(hidden_difference.shape)}; expected that of hidden, "
                f"{tuple(hidden.shape)}."
            )
    for name, least, kind in (("num_counted", 0, "rows"), ("chunk_bytes", 1, "bytes")):
        count = counts[name]
        if count is not None and not (isinstance(count, int) and count >= least):
            problems.append(f"{name} is {count!r}; expected a number of {kind}, an int, or None.")
    if problems:
        raise ConfigError(problems)


def check_direction(hidden: Tensor, noised_hidden: Tensor, hidden_difference: Tensor) -> Tensor:
    """Refuse a difference of the wrong sign, which would push the two passes apart unnoticed.

    Rounding may have removed the difference from the hidden states, so the two need not agree in direction. But
    they cannot be opposite: cos(h - h', hidden_difference) is about 0 then, and -1 for the wrong sign.

    Returns:
        Whether the sign is right (0-dim, bool), for devices on which the host does not wait to check.

    Raises:
        ConfigError: on a CPU, unless compiled.
    """
    dtype = wide_dtype(hidden)
    found = (hidden.detach().to(dtype) - noised_hidden.detach().to(dtype)).flatten()
    given = hidden_difference.detach().to(dtype).flatten()
    lengths = torch.linalg.vector_norm(found) * torch.linalg.vector_norm(given)
    right = ~(torch.dot(found, given) < -0.5 * lengths)  # NaN passes: the loss will be NaN
    if host_knows(right) and not bool(right):
        raise ConfigError(
            "hidden_difference points against hidden - noised_hidden; expected that difference itself, clean "
            "minus noised. Turn its sign."
        )
    return right


def _not_floating(**tensors: Tensor | None) -> list[str]:
    return [
        f"{name} is {tensor.dtype}; expected a floating dtype."
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_floating_point()
    ]


def elsewhere(leader: str, like: Tensor, **tensors: Tensor | None) -> list[str]:
    """The problems of tensors that are not on the device of ``like``."""
    return [
        f"{name} is on {tensor.device}; expected the device of {leader}, {like.device}."
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device != like.device
    ]


def host_knows(tensor: Tensor) -> bool:
    """Whether reading a tensor's values neither makes the host wait nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among tensors, at least fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
