"""What the loss is held to: float64, written down twice, with no code of the library.

``naive`` is the definition and autograd, for differences that float64 can see by subtraction; for small ones there
is the formula that the benchmarks use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.fused_loss_oracle import Divergence, symmetric_kl


def naive(z: torch.Tensor, noised_z: torch.Tensor) -> torch.Tensor:
    """sum_i (p_i - q_i)(log p_i - log q_i), an entry absent from both rows left out."""
    absent = torch.isinf(z) & torch.isinf(noised_z)
    log_ratio = (z.log_softmax(-1) - noised_z.log_softmax(-1)).masked_fill(absent, 0.0)
    return ((z.softmax(-1) - noised_z.softmax(-1)) * log_ratio).sum(-1)


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
    labels: str = "peaked",
) -> Head:
    """A head whose logits spread by 2.5 and whose differences of logits spread by ``noise``."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.randn(classes, width, generator=generator, dtype=wide) / width**0.5).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    hidden = 2.5 * torch.randn(rows, width, generator=generator, dtype=wide)
    if labels == "peaked":
        hidden = hidden + 8 * weight[target].to(wide)
    hidden = hidden.to(dtype)
    difference = noise * torch.randn(rows, width, generator=generator, dtype=wide)
    return Head(hidden, (hidden.to(wide) - difference).to(dtype), weight, target, difference)


def head_divergence(inputs: Head) -> Divergence:
    """Mean J over rows and its gradients, exact for h' = h - hidden_difference, whatever ``noised_hidden`` kept."""
    return symmetric_kl(inputs.hidden, inputs.hidden_difference, inputs.weight)


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
