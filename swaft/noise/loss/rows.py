"""Statistics and gradients of the loss for rows of logits, in torch, in place, in blocks that fit the cache.

Notation as in ``losses.py``, and per row: w = exp(z - max z), S = sum w, R = S without the label,
n = z' - z = -d, y = n - E_p[n] (centred, because J, p and q ignore a common offset, and so must rounding),
t = E_p[expm1(y)], delta = log p - log q = log(1 + t) - y, P = p - q, u = delta - K.

    J = sum P delta             L' = L + E_p[n] + log(1 + t)
    g = dJ/dz = p u + P         g' = dJ/dz' = -(q (u + J) + P)         g + g' = P u - J q

While |t| < 1/2 (near rows) P = -p (expm1(y) - t) / (1 + t), which is exact to rounding however small n is.
Far rows have a separate softmax for z'. On a CPU, a block of near rows takes a path with fewer passes over memory.
On other devices, no branch may depend on the values, so every block takes the path that works for both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swaft.noise.loss.options import LossOptions

_NEAR = 0.5
"""Largest |t| of a near row, and largest |delta| for which P is computed with expm1."""
_CPU_BLOCK_ELEMENTS = 2**20
"""Elements per block on a CPU: as many as possible, because threads wait for each other after every operation, but
few enough that five buffers stay in the shared cache."""
_ACCELERATOR_BLOCK_ELEMENTS = 2**24
"""Elements per block on other devices."""


ROW_MULTIPLE = 64
"""Alignment of rows on an accelerator, in elements: for 16-byte loads and tensor cores."""


def empty_rows(count: int, classes: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a matrix (count, classes) whose rows start at multiples of ``ROW_MULTIPLE`` elements."""
    stride = -(-classes // ROW_MULTIPLE) * ROW_MULTIPLE
    return torch.empty(count, stride, dtype=dtype, device=device)[:, :classes]


class RowGradients(NamedTuple):
    """Gradients of the weighted rows with respect to the products of hidden states and weight, each (R, V)."""

    clean: Tensor
    """G, of the clean product."""
    noised: Tensor | None
    """G', of the noised product; None if it is zero."""
    total: Tensor | None
    """G + G'. It is of second order in small noise, so it is not computed as the sum of rounded parts; None if it
    equals G."""


class RowStatistics(NamedTuple):
    """What each row contributes, unweighted (R,); 0 in rows that do not count."""

    cross_entropy: Tensor
    """CE, averaged over both passes with ``ce_on_noised``; 0 in rows that only count for the divergence."""
    divergence: Tensor
    """J."""
    log_normalizer: Tensor
    """L of the clean pass."""
    noised_log_normalizer: Tensor
    """L of the noised pass."""


class RowInputs(NamedTuple):
    """Rows of two products of hidden states and weight, and how much they count."""

    raw: Tensor
    """Clean hidden states times the weight (R, V), fp32 or float64, without scale, bias and soft-cap."""
    raw_noise: Tensor
    """Noised minus clean product (form "difference"), or the noised one ("direct"), (R, V)."""
    labels: Tensor
    """Class indices (R,), int64; any value in rows whose ``ce_weight`` is 0."""
    bias: Tensor | None
    """Bias of the head (V,)."""
    ce_weight: Tensor
    """Factor (R,) of each row's cross entropy and z term in the loss."""
    kl_weight: Tensor
    """Factor (R,) of each row's divergence in the loss."""


def rows(inputs: RowInputs, options: LossOptions, gradients: RowGradients | None) -> RowStatistics:
    """Compute loss statistics of rows and, if requested, the gradients of sum(ce CE + kl J).

    Args:
        inputs: the rows; both products are overwritten.
        options: of the loss.
        gradients: buffers for the gradients, any dtype; ``total`` may share memory with ``raw``, and ``noised``
            with ``raw_noise``. None: statistics only.
    """
    raw, raw_noise, labels, bias, ce_weight, kl_weight = inputs
    count, classes = raw.shape
    elements = _CPU_BLOCK_ELEMENTS if raw.device.type == "cpu" else _ACCELERATOR_BLOCK_ELEMENTS
    step = max(1, min(count, elements // classes))
    scratch = [raw.new_empty(step, classes) for _ in range(3 if options.softcap is None else 5)]
    labels = torch.where(ce_weight != 0, labels, 0)
    columns = [column.unsqueeze(-1) for column in (labels, ce_weight, kl_weight)]
    blocks = []
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        own = [buffer[: part.stop - start] for buffer in scratch]
        block = _Block(raw[part], raw_noise[part], own, *(column[part] for column in columns))
        out = None if gradients is None else [None if g is None else g[part] for g in gradients]
        blocks.append(_block(block, bias, options, out))
    return RowStatistics(*(torch.cat(values).squeeze(-1) for values in zip(*blocks, strict=True)))


def task_rows(statistics: RowStatistics, options: LossOptions) -> Tensor:
    """Cross entropy and z term of each row, CE + k L^2, averaged over both passes with ``ce_on_noised``."""
    square = statistics.log_normalizer.square()
    if options.ce_on_noised:
        square = (square + statistics.noised_log_normalizer.square()) / 2
    return statistics.cross_entropy + options.z_loss * square


class _Block(NamedTuple):
    """A block of rows: two filled buffers, free buffers, and columns (R, 1)."""

    z: Tensor
    y: Tensor
    scratch: list[Tensor]
    label: Tensor
    ce: Tensor
    kl: Tensor


class _Softmax(NamedTuple):
    """A softmax before its division, and the values the cross entropy needs; all but w are columns."""

    w: Tensor
    total: Tensor
    """S."""
    others: Tensor
    """R, in units of w."""
    log_normalizer: Tensor
    cross_entropy: Tensor


def _block(
    block: _Block, bias: Tensor | None, options: LossOptions, out: list[Tensor | None] | None
) -> RowStatistics:
    counts = (block.ce != 0) | (block.kl != 0)
    branches = _may_branch(block.z.device)
    if not (branches and bool(counts.all())):
        block.z.masked_fill_(~counts, 0.0)
        block.y.masked_fill_(~counts, 0.0)
    slopes = _logits(block, bias, options)

    clean = _softmax(block.z, block.label, options.label_smoothing, out=block.scratch[0])
    mean = torch.mul(clean.w, block.y, out=block.scratch[1]).sum(-1, keepdim=True) / clean.total
    block.y.sub_(mean)
    e = torch.expm1(block.y, out=block.scratch[1])
    t = torch.mul(clean.w, e, out=block.scratch[2]).sum(-1, keepdim=True) / clean.total
    near = t.abs() < _NEAR
    if branches and not options.ce_on_noised and bool(near.all()):
        divergence, noised_normalizer, parts = _near_rows(
            block, clean, mean, t, options, wanted=out is not None
        )
        cross_entropy = clean.cross_entropy
    else:
        divergence, noised_normalizer, cross_entropy, parts = _any_rows(
            block, clean, mean, t, near, options, wanted=out is not None
        )
    if out is not None and parts is not None:
        _write(parts, slopes, options.logit_scale, out)
    cross_entropy = torch.where(block.ce != 0, cross_entropy, 0.0)  # may be infinite: its label is a filler
    statistics = (cross_entropy, divergence, clean.log_normalizer, noised_normalizer)
    return RowStatistics(*(torch.where(counts, value, 0.0) for value in statistics))


def _may_branch(device: torch.device) -> bool:
    """Whether the host may read values of this device without waiting for it."""
    return device.type == "cpu"


def _logits(block: _Block, bias: Tensor | None, options: LossOptions) -> tuple[Tensor, Tensor] | None:
    """Turn the two products into z and n in place; return the slope f = dz/draw and f' - f of a soft-cap."""
    z, n = block.z, block.y
    if options.form == "direct":
        n.sub_(z)
    if options.logit_scale != 1:
        z.mul_(options.logit_scale)
        n.mul_(options.logit_scale)
    if bias is not None:
        z.add_(bias)
    kappa = options.softcap
    if kappa is None:
        return None
    z.div_(kappa)
    n.div_(kappa)
    slope, slope_change = block.scratch[3:]
    torch.cosh(z, out=slope).pow_(-2)
    noised = torch.add(z, n, out=slope_change).tanh_()
    z.tanh_()
    n.tanh_().mul_(1 - z * noised)  # tanh(a + b) - tanh a = tanh b (1 - tanh a tanh(a + b))
    noised.add_(z).mul_(n).neg_()  # (1 - tanh^2 b) - (1 - tanh^2 a) = -(tanh b - tanh a) (tanh b + tanh a)
    z.mul_(kappa)
    n.mul_(kappa)
    return slope, slope_change


def _softmax(z: Tensor, label: Tensor, smoothing: float, *, out: Tensor) -> _Softmax:
    """exp(z - max z), its sums with and without the label, and its cross entropy.

    CE = log(1 + R / w_y) for a probable label, where L - z_y would lose its digits; otherwise L - z_y.
    """
    maximum = z.amax(-1, keepdim=True)
    target = z.gather(-1, label)
    w = torch.sub(z, maximum, out=out).exp_()
    w_target = w.gather(-1, label)
    others = w.scatter_(-1, label, 0.0).sum(-1, keepdim=True)
    w.scatter_(-1, label, w_target)
    total = others + w_target
    probable = w_target > 0.5
    log_total = total.log()
    cross_entropy = torch.where(
        probable,
        torch.log1p(others / torch.where(probable, w_target, 1.0)),
        maximum - target + log_total,
    )
    if smoothing:
        cross_entropy = cross_entropy + smoothing * (target - z.mean(-1, keepdim=True))
    return _Softmax(w, total, others, maximum + log_total, cross_entropy)


_Parts = tuple[Tensor, Tensor, Tensor]
"""Gradients of a block with respect to the logits, in its buffers: clean, noised, total."""


def _near_rows(
    block: _Block, clean: _Softmax, mean: Tensor, t: Tensor, options: LossOptions, *, wanted: bool
) -> tuple[Tensor, Tensor, _Parts | None]:
    """J, L' and gradients of rows that are all near; scratch 1 holds expm1(y)."""
    z, y, (w, e, free) = block.z, block.y, block.scratch[:3]
    weighted = e.sub_(t).mul_(w)
    per_p = 1 / (clean.total * (1 + t))  # -P = weighted * per_p
    divergence = (torch.mul(weighted, y, out=free).sum(-1, keepdim=True) * per_p).clamp(min=0)
    noised_normalizer = clean.log_normalizer + mean + torch.log1p(t)
    if not wanted:
        return divergence, noised_normalizer, None

    left_over = torch.mul(w, y, out=free).sum(-1, keepdim=True) / clean.total
    minus_u = y.sub_(left_over)  # E_p[n] was rounded
    minus_big_p = weighted.mul_(block.kl * per_p)
    p = torch.mul(w, block.kl / clean.total, out=free)
    ce = _cross_entropy_gradient(clean, block.label, block.ce, options)
    if options.detach == "target":
        return divergence, noised_normalizer, (torch.sub(ce, minus_big_p, out=z), minus_big_p, ce)
    if options.detach == "noised":
        g = torch.addcmul(minus_big_p, p, minus_u, out=z)
        gradient = torch.sub(ce, g, out=z)
        return divergence, noised_normalizer, (gradient, y.zero_(), gradient)
    minus_u_and_j = y.sub_(divergence)
    if options.detach == "none":
        total = torch.addcmul(ce, minus_big_p, minus_u_and_j, out=z).addcmul_(p, divergence, value=-1)
        noised = torch.addcmul(minus_big_p, p.add_(minus_big_p), minus_u_and_j, out=y)
        return divergence, noised_normalizer, (torch.sub(total, noised, out=w), noised, total)
    noised = torch.addcmul(minus_big_p, p.add_(minus_big_p), minus_u_and_j, out=y)
    return divergence, noised_normalizer, (ce, noised, torch.add(ce, noised, out=z))


def _any_rows(
    block: _Block,
    clean: _Softmax,
    mean: Tensor,
    t: Tensor,
    near: Tensor,
    options: LossOptions,
    *,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, _Parts | None]:
    """J, L', CE and gradients of any rows, near or far."""
    z, y, (_, q, big_p) = block.z, block.y, block.scratch[:3]
    noised = _softmax(z.add_(y), block.label, options.label_smoothing, out=q)
    cross_entropy = clean.cross_entropy
    if options.ce_on_noised:
        cross_entropy = (cross_entropy + noised.cross_entropy) / 2
    log_mean = torch.where(near, torch.log1p(t), noised.log_normalizer - clean.log_normalizer)
    noised_normalizer = clean.log_normalizer + mean + log_mean

    p = clean.w.div_(clean.total)
    q.div_(noised.total)
    absent = (p == 0) & (q == 0)
    delta = torch.sub(log_mean, y, out=y).masked_fill_(absent, 0.0)
    torch.neg(delta, out=big_p).expm1_().mul_(p).neg_()
    torch.sub(p, q, out=z)
    torch.where(delta.abs() < _NEAR, big_p, z, out=big_p)
    divergence = torch.mul(big_p, delta, out=z).sum(-1, keepdim=True).clamp(min=0)
    if not wanted:
        return divergence, noised_normalizer, cross_entropy, None

    u = delta.sub_(torch.mul(p, delta, out=z).sum(-1, keepdim=True))
    g = torch.addcmul(big_p, p, u)
    noised_g = torch.addcmul(big_p, q, u + divergence).neg_()
    total_g = torch.where(near, big_p * u - divergence * q, g + noised_g)
    ce_share = block.ce / 2 if options.ce_on_noised else block.ce
    ce = _cross_entropy_gradient(
        clean._replace(w=p, total=torch.ones_like(t), others=clean.others / clean.total),
        block.label,
        ce_share,
        options,
    )
    if options.detach == "clean":
        g, total_g = torch.zeros_like(g), noised_g
    elif options.detach == "noised":
        noised_g, total_g = torch.zeros_like(g), g
    elif options.detach == "target":
        g, noised_g, total_g = big_p, -big_p, torch.zeros_like(g)
    g = torch.addcmul(ce, g, block.kl)
    noised_g = noised_g * block.kl
    total_g = torch.addcmul(ce, total_g, block.kl)
    if options.ce_on_noised:
        shifted = noised._replace(
            w=q,
            total=torch.ones_like(t),
            others=noised.others / noised.total,
            log_normalizer=noised_normalizer,
        )
        noised_ce = _cross_entropy_gradient(shifted, block.label, ce_share, options)
        noised_g.add_(noised_ce)
        total_g.add_(noised_ce)
    return divergence, noised_normalizer, cross_entropy, (g, noised_g, total_g)


def _cross_entropy_gradient(softmax: _Softmax, label: Tensor, ce: Tensor, options: LossOptions) -> Tensor:
    """Compute ce [(1 + 2 k L) p - (1 - s) 1[i = y] - s / V] in w's storage; p_y - 1 = -R / S at the label."""
    w, smoothing = softmax.w, options.label_smoothing
    z_factor = 2 * options.z_loss * softmax.log_normalizer
    uniform = smoothing / w.shape[-1]
    at_label = w.gather(-1, label) / softmax.total * z_factor - softmax.others / softmax.total
    w.mul_(ce * (1 + z_factor) / softmax.total)
    if smoothing:
        w.sub_(ce * uniform)
    return w.scatter_(-1, label, ce * (at_label + smoothing - uniform))


def _write(
    parts: _Parts, slopes: tuple[Tensor, Tensor] | None, logit_scale: float, out: list[Tensor | None]
) -> None:
    """Propagate the gradients through soft-cap and scale, and write them to their buffers."""
    clean, noised, total = parts
    if slopes is not None:
        slope, slope_change = slopes
        clean, noised, total = (
            clean * slope,
            noised * (slope + slope_change),
            torch.addcmul(total * slope, noised, slope_change),
        )
    for gradient, target in zip((clean, noised, total), out, strict=True):
        if target is not None:
            if logit_scale != 1:
                gradient = gradient * logit_scale
            if target.data_ptr() != gradient.data_ptr():
                target.copy_(gradient)
