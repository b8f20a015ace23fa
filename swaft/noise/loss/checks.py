"""Tensors that do not fit a loss, refused by name before anything is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from swaft.errors import ConfigError
from swaft.noise.loss.options import Form


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
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(right):
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
