"""What the loss is held to: float64, written down twice, with no code of the library.

``naive`` is the definition and autograd, for differences that float64 can see by subtraction. ``closed_form`` is
the formula for small ones; tests hold it to the definition in 60 digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Divergence(NamedTuple):
    value: torch.Tensor
    clean: torch.Tensor
    noised: torch.Tensor
    total: torch.Tensor


def naive(z: torch.Tensor, noised_z: torch.Tensor) -> torch.Tensor:
    """sum_i (p_i - q_i)(log p_i - log q_i), an entry absent from both rows left out."""
    absent = torch.isinf(z) & torch.isinf(noised_z)
    log_ratio = (z.log_softmax(-1) - noised_z.log_softmax(-1)).masked_fill(absent, 0.0)
    return ((z.softmax(-1) - noised_z.softmax(-1)) * log_ratio).sum(-1)


def closed_form(z: torch.Tensor, difference: torch.Tensor) -> Divergence:
    """J and its gradients in z and z' = z - difference; all in float64."""
    assert z.dtype == difference.dtype == torch.float64
    p = z.softmax(-1)
    d = difference - (p * difference).sum(-1, keepdim=True)
    delta = d + torch.log1p((p * torch.expm1(-d)).sum(-1, keepdim=True))
    p_minus_q = torch.where(delta > -1, -p * torch.expm1(-delta), p - (z - difference).softmax(-1))
    q = p - p_minus_q
    value = (p_minus_q * delta).sum(-1, keepdim=True)
    kl = (p * delta).sum(-1, keepdim=True)
    clean = p * (delta - kl) + p_minus_q
    noised = -(q * (delta + value - kl) + p_minus_q)
    total = p_minus_q * (delta - kl) - value * q
    total = torch.where((delta.abs() > 1).any(-1, keepdim=True), clean + noised, total)
    return Divergence(value.squeeze(-1), clean, noised, total)


def cross_entropy(
    z: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """CE + z term of each row, ignored ones 0; right for a label of any probability."""
    safe = labels.clamp(min=0)
    target = z.gather(-1, safe.unsqueeze(-1))
    others = (z - target).scatter(-1, safe.unsqueeze(-1), -torch.inf)
    rows = torch.log1p(others.exp().sum(-1))
    if smoothing:
        rows = rows + smoothing * (target.squeeze(-1) - z.mean(-1))
    return torch.where(labels >= 0, rows + z_loss * z.logsumexp(-1).square(), 0.0)


class Head(NamedTuple):
    """Inputs of the fused loss, as its caller has them."""

    hidden: torch.Tensor
    noised_hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    hidden_difference: torch.Tensor


def head(
    *,
    noise: float,
    rows: int = 24,
    width: int = 32,
    classes: int = 601,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    labels: str = "peaked",
) -> Head:
    """A head whose logits spread by 2.5 and whose differences of logits spread by ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.randn(classes, width, generator=generator, dtype=wide) / width**0.5).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    hidden = 2.5 * torch.randn(rows, width, generator=generator, dtype=wide)
    if labels == "peaked":
        hidden = hidden + 8 * weight[target].to(wide)
    hidden = hidden.to(dtype)
    difference = noise * torch.randn(rows, width, generator=generator, dtype=wide)
    return Head(hidden, (hidden.to(wide) - difference).to(dtype), weight, target, difference)


class HeadLoss(NamedTuple):
    """Mean J over rows and its gradients."""

    value: torch.Tensor
    hidden: torch.Tensor
    noised_hidden: torch.Tensor
    weight: torch.Tensor


def head_divergence(inputs: Head) -> HeadLoss:
    """Exact for h' = h - hidden_difference, whatever ``noised_hidden`` has kept of it."""
    hidden, weight, difference = (
        tensor.double() for tensor in (inputs.hidden, inputs.weight, inputs.hidden_difference)
    )
    rows = closed_form(hidden @ weight.mT, difference @ weight.mT)
    count = hidden.shape[0]
    weight_gradient = rows.total.mT @ hidden - rows.noised.mT @ difference
    return HeadLoss(
        rows.value.mean(), rows.clean @ weight / count, rows.noised @ weight / count, weight_gradient / count
    )


def naive_head_loss(
    hidden: torch.Tensor,
    noised_hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    divergence_weight: float = 1.0,
    ce_on_noised: bool = False,
) -> torch.Tensor:
    """The whole loss, means over rows whose label is not -100, by two full tensors of logits and autograd."""

    def logits(states: torch.Tensor) -> torch.Tensor:
        raw = F.linear(logit_scale * states, weight, bias)
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    z, noised_z = logits(hidden), logits(noised_hidden)
    rows = cross_entropy(z, labels, smoothing=label_smoothing, z_loss=z_loss)
    if ce_on_noised:
        rows = (rows + cross_entropy(noised_z, labels, smoothing=label_smoothing, z_loss=z_loss)) / 2
    counted = labels >= 0
    divergence = torch.where(counted, naive(z, noised_z), 0.0)
    return (rows + divergence_weight * divergence).sum() / counted.sum()


def relative_error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    """|computed - exact| / |exact|, norms over all entries; the difference itself where the exact one is 0."""
    computed, exact = computed.detach().double(), exact.detach().double()
    scale = exact.norm()
    return float((computed - exact).norm() / (scale if scale > 0 else 1.0))


def leaves(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors if tensor is not None]


def worst(computed, exact) -> float:
    return max(relative_error(a, b) for a, b in zip(computed, exact, strict=True))
