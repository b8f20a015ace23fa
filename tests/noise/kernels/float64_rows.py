"""What the row kernels should give: the loss of every row in float64, differentiated by autograd.

The noised logits are written as z + n, and the divergence as a covariance under p, so that neither the value nor a
derivative is a difference of nearly equal numbers: with (raw, n) as variables, d/dn is G' and d/draw is G + G'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowInputs


@dataclass(frozen=True)
class Expected:
    """Statistics and gradients by their name, float64."""

    statistics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def expected(rows: RowInputs, options: LossOptions) -> Expected:
    counts = (rows.ce_weight != 0) | (rows.kl_weight != 0)
    raw = rows.raw.double().masked_fill(~counts[:, None], 0.0).requires_grad_()
    noise = rows.raw_noise.double().masked_fill(~counts[:, None], 0.0)
    if options.form == "direct":
        noise = torch.where(raw == noise, 0.0, noise - raw).detach()
    noise = torch.where(raw == -torch.inf, 0.0, noise).detach().requires_grad_()

    z, n = raw * options.logit_scale, noise * options.logit_scale
    if rows.bias is not None:
        z = z + rows.bias.double()
    if (cap := options.softcap) is not None:
        a, b = torch.tanh(z / cap), torch.tanh((z + n) / cap)
        z, n = cap * a, cap * torch.tanh(n / cap) * (1 - a * b)

    valid = (rows.labels >= 0) & (rows.labels < z.shape[1])
    labels = torch.where(valid, rows.labels, 0)
    cross_entropy, log_normalizer = _cross_entropy(z, labels, options)
    noised_cross_entropy, noised_log_normalizer = _cross_entropy(z + n, labels, options)
    task = cross_entropy + options.z_loss * log_normalizer**2
    if options.ce_on_noised:
        task = (task + noised_cross_entropy + options.z_loss * noised_log_normalizer**2) / 2
        cross_entropy = (cross_entropy + noised_cross_entropy) / 2

    loss = torch.where(rows.ce_weight != 0, task * rows.ce_weight.double(), 0.0)
    loss = loss + rows.kl_weight.double() * _detached_divergence(z, n, options.detach)
    total, noised = torch.autograd.grad(loss.sum(), (raw, noise), materialize_grads=True)
    statistics = {
        "cross_entropy": torch.where(rows.ce_weight != 0, cross_entropy, 0.0),
        "divergence": _divergence(z, n),
        "log_normalizer": log_normalizer,
        "noised_log_normalizer": noised_log_normalizer,
    }
    return Expected(
        {name: value.detach() * counts for name, value in statistics.items()},
        _without_rounding({"clean": total - noised, "noised": noised, "total": total}),
    )


def _without_rounding(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for a gradient of which only rounding is left, where a side is detached."""
    norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in gradients.items()}
    smallest = 1e-12 * max(norms.values())
    return {name: g if norms[name] >= smallest else torch.zeros_like(g) for name, g in gradients.items()}


def _divergence(z: Tensor, n: Tensor) -> Tensor:
    """J = Cov_p(n, exp(n)) / E_p[exp(n)], n centred."""
    p = z.softmax(-1)
    y = n - (p * n).sum(-1, keepdim=True).detach()  # no constant shift of n changes J
    e = torch.expm1(y)
    mean_e = (p * e).sum(-1, keepdim=True)
    mean_y = (p * y).sum(-1, keepdim=True)
    return ((p * (y - mean_y) * (e - mean_e)).sum(-1, keepdim=True) / (1 + mean_e)).squeeze(-1)


def _detached_divergence(z: Tensor, n: Tensor, detach: str) -> Tensor:
    held = z - z.detach()  # 0, with the gradient of z
    if detach == "clean":
        return _divergence(z.detach(), n + held)
    if detach == "noised":
        return _divergence(z, n.detach() - held)
    if detach == "target":
        log_p, log_q = z.log_softmax(-1), (z + n).log_softmax(-1)
        return (log_p.exp().detach() * -log_q - log_q.exp().detach() * log_p).nan_to_num().sum(-1)
    return _divergence(z, n)


def _cross_entropy(z: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    target = z.gather(-1, labels[:, None])
    others = (z - target).scatter(-1, labels[:, None], -torch.inf)
    highest = others.amax(-1, keepdim=True).clamp(min=0.0).detach()
    log_normalizer = z.logsumexp(-1)
    rest = torch.exp(others - highest).sum(-1)
    unlikely = highest.squeeze(-1) + torch.log(rest + torch.exp(-highest.squeeze(-1)))
    loss = torch.where(highest.squeeze(-1) == 0, torch.log1p(rest), unlikely)
    if s := options.label_smoothing:
        loss = (1 - s) * loss + s * (log_normalizer - z.mean(-1))
    return loss, log_normalizer
