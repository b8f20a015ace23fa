"""Tensors that do not fit a loss, refused by name before anything is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from swaft.errors import ConfigError
from swaft.noise.loss.options import Form, number_problems


def check_logits(logits: Tensor, noised_logits: Tensor, labels: Tensor | None = None) -> None:
    """Refuse logits that are not two of a kind, and labels that are not theirs.

    Raises:
        ConfigError: naming every problem.
    """
    problems = _not_floating(logits=logits, noised_logits=noised_logits)
    problems += _elsewhere("logits", logits, noised_logits=noised_logits, labels=labels)
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
    hidden: Tensor,
    noised_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    hidden_difference: Tensor | None,
    form: Form,
    num_counted: int | None,
    chunk_bytes: int | None,
) -> None:
    """Refuse operands of a head that do not fit, and numbers that are none.

    Raises:
        ConfigError: naming every problem.
    """
    others = {
        "noised_hidden": noised_hidden,
        "weight": weight,
        "bias": bias,
        "hidden_difference": hidden_difference,
    }
    problems = _not_floating(hidden=hidden, **others)
    problems += _elsewhere("hidden", hidden, labels=labels, **others)
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
    if num_counted is not None and not (isinstance(num_counted, int) and num_counted >= 0):
        problems.append(f"num_counted is {num_counted!r}; expected a number of rows, an int, or None.")
    if chunk_bytes is not None and not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        problems.append(f"chunk_bytes is {chunk_bytes!r}; expected a number of bytes, an int, or None.")
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


def check_rows(
    labels: Tensor, token_weight: Tensor | None, kl_mask: Tensor | None, kl_normalizer: float | Tensor | None
) -> None:
    """Refuse labels that are no class indices, and what does not fit them.

    Raises:
        ConfigError: naming every problem.
    """
    problems = []
    if labels.dtype not in (torch.int64, torch.int32):
        problems.append(f"labels is {labels.dtype}; expected torch.int64 or torch.int32.")
    for name, tensor in (("token_weight", token_weight), ("kl_mask", kl_mask)):
        if tensor is not None and tensor.shape != labels.shape:
            problems.append(
                f"{name} has shape {tuple(tensor.shape)}; expected that of the labels, {tuple(labels.shape)}."
            )
    problems += _elsewhere("the labels", labels, token_weight=token_weight, kl_mask=kl_mask)
    if kl_mask is not None and kl_mask.dtype != torch.bool:
        problems.append(f"kl_mask is {kl_mask.dtype}; expected torch.bool. Pass factors as token_weight.")
    if isinstance(kl_normalizer, Tensor):
        if kl_normalizer.dim() != 0:
            problems.append(
                f"kl_normalizer has shape {tuple(kl_normalizer.shape)}; expected a number or a 0-dim tensor."
            )
        if kl_normalizer.device.type != "cpu":  # a number that the host holds is at home everywhere
            problems += _elsewhere("the labels", labels, kl_normalizer=kl_normalizer)
    elif kl_normalizer is not None:
        problems += number_problems("kl_normalizer", kl_normalizer, "0 or more", lambda n: n >= 0)
    for name, factor in (("token_weight", token_weight), ("kl_normalizer", kl_normalizer)):
        if isinstance(factor, Tensor) and factor.requires_grad and torch.is_grad_enabled():
            problems.append(f"{name} requires a gradient; expected a constant, for it gets none. Detach it.")
    if problems:
        raise ConfigError(problems)


def _not_floating(**tensors: Tensor | None) -> list[str]:
    return [
        f"{name} is {tensor.dtype}; expected a floating dtype."
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_floating_point()
    ]


def _elsewhere(leader: str, like: Tensor, **tensors: Tensor | None) -> list[str]:
    """Problems of the tensors that are not on the device of one."""
    return [
        f"{name} is on {tensor.device}; expected the device of {leader}, {like.device}."
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device != like.device
    ]
