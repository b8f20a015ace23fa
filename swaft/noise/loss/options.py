"""What the noise-stability loss can be asked for, and what it refuses by name before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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
    """What can be asked of a loss; what the rows have in common comes first, then how much each of them counts.

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
    ignore_index: int = -100
    """Label of the rows that do not count."""
    token_weight: Tensor | None = None
    """Factor of each row (...), 0 or more where it counts, None for 1. A negative one makes the loss NaN where the
    host cannot tell, and so does a negative ``kl_normalizer``."""
    kl_mask: Tensor | None = None
    """Rows of the divergence (...), bool; None for those whose label counts."""
    kl_normalizer: float | Tensor | None = None
    """What the sum of the divergences is divided by; None for the sum of their weights (reduction "mean") or 1."""
    reduction: Reduction = "mean"
    """"mean" divides the cross entropy by the sum of its weights, "sum" by nothing."""

    @property
    def noised_moves(self) -> bool:
        """Whether the loss has a gradient in the noised pass."""
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


def check_logits(logits: Tensor, noised_logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuse logits that are not two of a kind, and labels that are not theirs.

    Raises:
        ConfigError: naming every problem.
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
    """Refuse operands of a head that do not fit, and numbers that are none.

    Args:
        operands: hidden states, noised ones, weight, bias and hidden difference.
        labels: of the rows.
        form: of the noised logits.
        counts: "num_counted" and "chunk_bytes".

    Raises:
        ConfigError: naming every problem.
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
    """Refuse a difference of the wrong sign, which would push the two passes apart and look well.

    Rounding may have taken the difference out of the hidden states, so it need not point where they differ; but it
    cannot point the other way: cos(h - h', hidden_difference) is about 0 then, and -1 for the wrong sign.

    Returns:
        Whether the sign is right (0-dim, bool), for devices that the host does not wait for.

    Raises:
        ConfigError: on a CPU, unless compiled.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    found = (hidden.detach().to(dtype) - noised_hidden.detach().to(dtype)).flatten()
    given = hidden_difference.detach().to(dtype).flatten()
    lengths = torch.linalg.vector_norm(found) * torch.linalg.vector_norm(given)
    right = ~(torch.dot(found, given) < -0.5 * lengths)  # NaN passes: the loss will say so
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
    """Problems of the tensors that are not on the device of one."""
    return [
        f"{name} is on {tensor.device}; expected the device of {leader}, {like.device}."
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device != like.device
    ]


def host_knows(tensor: Tensor) -> bool:
    """Whether a look at a tensor's values neither makes the host wait nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest type among tensors, fp32 at the least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
