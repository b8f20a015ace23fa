"""The row kernel in Triton: one program a row, two passes over the vocabulary.

The first pass sums what value and gradients are made of, the second writes the gradients. Formulas and signs are
those of the torch kernel beside it (``rows.py``); what differs is how the sums are built up:

* Every lane keeps a softmax of its own over the columns it meets, so the pass needs no barrier between tiles.
* The differences d = z - z' are summed relative to a centre, d at the most probable class so far. A shift shared by
  the whole row then costs no digits. The centre moves when the maximum does, and the sums move with it, exactly.
* The label stays out of the sums and joins at the end, so that L - z_y and p_y - 1 keep their digits as p_y -> 1.
* Beside the sums that are accurate for close rows stands a softmax of the noised row, for rows far apart.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (Triton's language has no types: what it returns is taken for nothing, and launch options for mistakes.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from swaft.noise.loss.elementary_triton import SMALL, exp, expm1_series, log1p, softcap
from swaft.noise.loss.rows import RowGradients, RowInputs, RowStatistics

if TYPE_CHECKING:
    from swaft.noise.loss.options import LossOptions

WARPS = 8
"""Warps of a program."""
REGISTERS = 128
"""Registers of a thread at most: two programs of 8 warps then fit a multiprocessor."""
LANES = 128 * WARPS
"""Lanes of a tile: 4 numbers in fp32 a thread, one load of 16 bytes. A tile holds a few numbers of each lane, which
are reduced within the thread; with more of them, or more lanes, the registers do not do."""

_NEAR = tl.constexpr(0.5)
"""Rows with |t| below it take the sums that are accurate for close rows."""
_NOTHING = tl.constexpr(-1e30)
"""Maximum of a lane that has met no column; finite, so that differences of maxima stay numbers."""
_NONE = tl.constexpr(float("-inf"))
"""Logit of a column that is not there."""


@triton.jit
def _uncapped(raw, raw_noise, bias, columns, mask, scale, DIRECT: tl.constexpr, SCALED: tl.constexpr,
              BIASED: tl.constexpr):  # fmt: skip
    """Logits before the soft-cap, and clean minus noised. A column that is -inf in both rows differs by 0."""
    z = tl.load(raw + columns, mask=mask, other=_NONE)
    noise = tl.load(raw_noise + columns, mask=mask, other=_NONE)
    d = tl.where(z == noise, 0.0, z - noise) if DIRECT else tl.where(z == _NONE, 0.0, -noise)
    if SCALED:
        z *= scale
        d *= scale
    if BIASED:
        z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return z, d


@triton.jit
def _recentred(S, A, T, U, noised_S, noised_A, decay, growth, shift):
    """The sums with all clean weights times ``decay`` and the centre moved by ``shift``.

    growth = decay exp(shift) is given, for decay may be 0 where it is not.
    """
    gain = tl.where(tl.abs(shift) < SMALL, decay * expm1_series(shift), growth - decay)  # decay expm1(shift)
    moved = A - shift * S
    return (
        decay * S,
        decay * moved,
        growth * T + gain * S,
        growth * (U - shift * T) + gain * moved,
        noised_A - shift * noised_S,
    )


@triton.jit
def _label_loss(others, log_label):
    """L - z_y = log(1 + others / exp(log_label)), for weights relative to the largest."""
    label = exp(log_label)
    likely = others <= label
    return tl.where(likely, log1p(tl.where(likely, others / label, 0.0)), tl.log(others + label) - log_label)


@triton.jit
def _rows_kernel(
    raw, raw_noise,  # (R, V) fp32, rows raw_stride and noise_stride apart
    bias,  # (V,) or None
    labels, ce_weights, kl_weights,  # (R,): int64, fp32, fp32
    clean_gradient, noised_gradient, total_gradient,  # (R, V) of any floating dtype, or None; strides below
    statistics,  # (4, R) fp32: CE, J, L, L'
    num_rows, num_classes,  # R, V
    raw_stride, noise_stride, clean_stride, noised_stride, total_stride,  # in elements
    scale, cap, smoothing, z_loss,  # numbers of LossOptions; cap is 1 without a soft-cap
    DIRECT: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,  # see ``variant``
    SMOOTHED: tl.constexpr, CE_ON_NOISED: tl.constexpr, DETACH: tl.constexpr,
    GRADIENTS: tl.constexpr, NOISED: tl.constexpr, TOTAL: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    raw += row * raw_stride
    raw_noise += row * noise_stride
    ce_weight = tl.load(ce_weights + row).to(tl.float32)
    kl_weight = tl.load(kl_weights + row).to(tl.float32)
    block = tl.arange(0, BLOCK)
    if GRADIENTS:
        clean_gradient += row * clean_stride
        if NOISED:
            noised_gradient += row * noised_stride
        if TOTAL:
            total_gradient += row * total_stride

    if (ce_weight == 0) & (kl_weight == 0):
        for statistic in tl.static_range(4):
            tl.store(statistics + statistic * num_rows + row, 0.0)
        if GRADIENTS:
            nothing = tl.zeros([BLOCK], tl.float32)
            for start in range(0, num_classes, BLOCK):
                columns = start + block
                mask = columns < num_classes
                tl.store(clean_gradient + columns, nothing, mask=mask)
                if NOISED:
                    tl.store(noised_gradient + columns, nothing, mask=mask)
                if TOTAL:
                    tl.store(total_gradient + columns, nothing, mask=mask)
    else:
        scale = tl.cast(scale, tl.float32)
        cap = tl.cast(cap, tl.float32)
        smoothing = tl.cast(smoothing, tl.float32)
        z_loss = tl.cast(z_loss, tl.float32)
        label = tl.load(labels + row)
        valid = (label >= 0) & (label < num_classes)
        label_z, label_d = _uncapped(raw, raw_noise, bias, label, valid, scale, DIRECT, SCALED, BIASED)
        label_z, label_d, _slope, _noised_slope = softcap(label_z, label_d, cap, CAPPED)
        label_z = tl.where(valid, label_z, _NONE)
        label = tl.where(valid, label, -1).to(tl.int32)

        # Pass 1. Relative to a lane's maximum m and centre c:  w = exp(z - m), x = d - c, and
        # S = sum w, A = sum w x, T = sum w expm1(-x), U = sum w x expm1(-x);
        # of the noised row, whose log weights are z - m - x and whose largest is mu: noised_S, noised_A = sum .. x.
        tile = tl.arange(0, TILE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        m = tl.full([LANES], _NOTHING, tl.float32)
        mu = tl.full([LANES], _NOTHING, tl.float32)
        c = tl.zeros([LANES], tl.float32)
        S = tl.zeros([LANES], tl.float32)
        A = tl.zeros([LANES], tl.float32)
        T = tl.zeros([LANES], tl.float32)
        U = tl.zeros([LANES], tl.float32)
        noised_S = tl.zeros([LANES], tl.float32)
        noised_A = tl.zeros([LANES], tl.float32)
        sum_z = tl.zeros([LANES], tl.float32)
        sum_d = tl.zeros([LANES], tl.float32)
        for start in range(0, num_classes, TILE * LANES):
            columns = start + tile
            mask = columns < num_classes
            z, d = _uncapped(raw, raw_noise, bias, columns, mask, scale, DIRECT, SCALED, BIASED)
            z, d, slope, noised_slope = softcap(z, d, cap, CAPPED)
            if SMOOTHED:
                sum_z += tl.sum(tl.where(mask, z, 0.0), 0)
                if CE_ON_NOISED:
                    sum_d += tl.sum(tl.where(mask, d, 0.0), 0)
            z = tl.where(mask & (columns != label), z, _NONE)

            highest = tl.max(z, 0)
            centre = tl.max(tl.where(z == highest[None, :], d, _NONE), 0)
            centre = tl.where(highest > m, centre, c)
            highest = tl.maximum(highest, m)
            rise, shift = highest - m, centre - c
            S, A, T, U, noised_A = _recentred(
                S, A, T, U, noised_S, noised_A, exp(-rise), exp(shift - rise), shift
            )
            m, c = highest, centre
            mu += shift - rise

            from_m = z - m[None, :]
            x = d - c[None, :]
            noised_from_m = from_m - x
            noised_highest = tl.maximum(mu, tl.max(noised_from_m, 0))
            fade = exp(mu - noised_highest)
            mu = noised_highest
            w = exp(from_m)
            noised_w = exp(noised_from_m - mu[None, :])
            change = tl.where(
                tl.abs(x) < SMALL, w * expm1_series(-x), noised_w * exp(mu)[None, :] - w
            )  # w expm1(-x)
            S += tl.sum(w, 0)
            A += tl.sum(w * x, 0)
            T += tl.sum(change, 0)
            U += tl.sum(change * x, 0)
            noised_S = noised_S * fade + tl.sum(noised_w, 0)
            noised_A = noised_A * fade + tl.sum(noised_w * x, 0)

        # The lanes and the label, brought to one maximum M and one centre C.
        highest = tl.max(m, 0)
        C = tl.where(label_z >= highest, label_d, tl.max(tl.where(m == highest, c, _NONE), 0))
        M = tl.maximum(highest, label_z)
        rise, shift = M - m, C - c
        S, A, T, U, noised_A = _recentred(
            S, A, T, U, noised_S, noised_A, exp(-rise), exp(shift - rise), shift
        )
        mu += shift - rise
        log_label = label_z - M
        noised_log_label = log_label + (C - label_d)
        label_S, label_A, label_T, label_U, label_noised_A = _recentred(
            1.0, 0.0, 0.0, 0.0, 1.0, 0.0, exp(log_label), exp(noised_log_label), C - label_d
        )
        others = tl.sum(S, 0)
        S_row = others + label_S
        a = (tl.sum(A, 0) + label_A) / S_row
        t = (tl.sum(T, 0) + label_T) / S_row
        u = (tl.sum(U, 0) + label_U) / S_row
        noised_highest = tl.maximum(tl.max(mu, 0), noised_log_label)
        fade = exp(mu - noised_highest)
        noised_log_label -= noised_highest
        label_noised_w = exp(noised_log_label)
        noised_others = tl.sum(noised_S * fade, 0)
        noised_S_row = noised_others + label_noised_w
        noised_a = (tl.sum(noised_A * fade, 0) + label_noised_A * label_noised_w) / noised_S_row

        # J = E_p[d] - E_q[d]; offset = log p - log q - x.
        near = tl.abs(t) < _NEAR
        J = tl.where(near, tl.maximum((a * t - u) / (1 + t), 0.0), a - noised_a)
        offset = tl.where(near, log1p(tl.where(near, t, 0.0)), noised_highest + tl.log(noised_S_row / S_row))
        L = M + tl.log(S_row)
        noised_L = (M - C) + (noised_highest + tl.log(noised_S_row))

        cross_entropy = _label_loss(others, log_label)
        if CE_ON_NOISED:
            noised_cross_entropy = _label_loss(noised_others, noised_log_label)
        if SMOOTHED:
            mean_z = tl.sum(sum_z, 0) / num_classes
            cross_entropy = (1 - smoothing) * cross_entropy + smoothing * (L - mean_z)
            if CE_ON_NOISED:
                noised_mean_z = mean_z - tl.sum(sum_d, 0) / num_classes
                noised_cross_entropy = (1 - smoothing) * noised_cross_entropy + smoothing * (
                    noised_L - noised_mean_z
                )
        if CE_ON_NOISED:
            cross_entropy = (cross_entropy + noised_cross_entropy) / 2
            ce_weight /= 2
        # A label that is to count and is out of range makes the loss NaN; it cannot be raised from here.
        cross_entropy = tl.where(valid, cross_entropy, float("nan"))
        cross_entropy = tl.where(ce_weight == 0, 0.0, cross_entropy)
        tl.store(statistics + row, cross_entropy)
        tl.store(statistics + num_rows + row, J)
        tl.store(statistics + 2 * num_rows + row, L)
        tl.store(statistics + 3 * num_rows + row, noised_L)

        # Pass 2, with P = p - q:  dJ/dz = p (x - a) + P,  dJ/dz' = -(q (x - a') + P),  a' = E_q[x], and their sum
        # (x - a) P - J q, which is of second order in the difference and must not be left to a subtraction.
        if GRADIENTS:
            inverse_S, inverse_noised_S = 1 / S_row, 1 / noised_S_row
            p_y_minus_1, q_y_minus_1 = -others / S_row, -noised_others / noised_S_row  # p_y - 1, q_y - 1
            per_class = smoothing / num_classes
            for start in range(0, num_classes, BLOCK):
                columns = start + block
                mask = columns < num_classes
                z, d = _uncapped(raw, raw_noise, bias, columns, mask, scale, DIRECT, SCALED, BIASED)
                z, d, slope, noised_slope = softcap(z, d, cap, CAPPED)
                x = d - C
                p = exp(z - M) * inverse_S
                q = exp(z - M - x - noised_highest) * inverse_noised_S
                log_ratio = x + offset
                P = tl.where(tl.abs(log_ratio) < SMALL, -p * expm1_series(-log_ratio), p - q)
                if DETACH == "target":
                    g, noised_g, sum_g = P, -P, tl.zeros_like(P)
                else:
                    g = p * (x - a) + P
                    noised_g = -(q * (x - noised_a) + P)
                    sum_g = tl.where(near, (x - a) * P - J * q, g + noised_g)
                    if DETACH == "clean":
                        g, sum_g = tl.zeros_like(P), noised_g
                    if DETACH == "noised":
                        noised_g, sum_g = tl.zeros_like(P), g

                at_label = columns == label
                base = tl.where(at_label, p_y_minus_1, p) + 2 * z_loss * L * p
                ce = ce_weight * (base + tl.where(at_label, smoothing, 0.0) - per_class)
                g = ce + kl_weight * g
                noised_g = kl_weight * noised_g
                sum_g = ce + kl_weight * sum_g
                if CE_ON_NOISED:
                    base = tl.where(at_label, q_y_minus_1, q) + 2 * z_loss * noised_L * q
                    ce = ce_weight * (base + tl.where(at_label, smoothing, 0.0) - per_class)
                    noised_g += ce
                    sum_g += ce
                if CAPPED:
                    # noised_slope - slope = (tanh a - tanh b)(tanh a + tanh b)
                    sum_g = sum_g * slope + noised_g * ((d / cap) * ((z + (z - d)) / cap))
                    g *= slope
                    noised_g *= noised_slope
                if SCALED:
                    g *= scale
                    noised_g *= scale
                    sum_g *= scale
                tl.store(clean_gradient + columns, g, mask=mask)
                if NOISED:
                    tl.store(noised_gradient + columns, noised_g, mask=mask)
                if TOTAL:
                    tl.store(total_gradient + columns, sum_g, mask=mask)


def rows(inputs: RowInputs, options: LossOptions, gradients: RowGradients | None) -> RowStatistics:
    """Value of every row and, where buffers are given, its gradients; the torch kernel's twin in ``rows.py``.

    Args:
        inputs: the rows, fp32, contiguous each; the products are left alone.
        options: what is computed.
        gradients: buffers (R, V) of any floating dtype, not those of the products; None: statistics only.

    Returns:
        Statistics of the rows, (R,) each, fp32.
    """
    raw, raw_noise = inputs.raw, inputs.raw_noise
    num_rows, num_classes = raw.shape
    statistics = torch.empty((4, num_rows), dtype=torch.float32, device=raw.device)
    if num_rows:
        clean, noised, total = gradients or (None, None, None)
        matrices = (raw, raw_noise, clean, noised, total)
        with torch.cuda.device_of(raw):
            _rows_kernel[(num_rows,)](
                *(raw, raw_noise),
                None if inputs.bias is None else inputs.bias.contiguous(),
                *(each.contiguous() for each in (inputs.labels, inputs.ce_weight, inputs.kl_weight)),
                *(clean, noised, total, statistics),
                *(num_rows, num_classes),
                *(0 if matrix is None else matrix.stride(0) for matrix in matrices),
                float(options.logit_scale),
                1.0 if options.softcap is None else float(options.softcap),
                float(options.label_smoothing),
                float(options.z_loss),
                **variant(options, biased=inputs.bias is not None, gradients=gradients),
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )
    return RowStatistics(*statistics)


def variant(options: LossOptions, *, biased: bool, gradients: RowGradients | None) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what changes its code."""
    capped = options.softcap is not None
    return {
        "DIRECT": options.form == "direct",
        "SCALED": options.logit_scale != 1.0,
        "BIASED": biased,
        "CAPPED": capped,
        "SMOOTHED": options.label_smoothing != 0.0,
        "CE_ON_NOISED": options.ce_on_noised,
        "DETACH": options.detach,
        "GRADIENTS": gradients is not None,
        "NOISED": gradients is not None and gradients.noised is not None,
        "TOTAL": gradients is not None and gradients.total is not None,
        "TILE": 2 if capped else 4,
        "LANES": LANES,
        "BLOCK": 2 * LANES,
    }
