"""The row kernel in Triton: one program per row, two passes over the vocabulary.

The first pass computes the sums that value and gradients need; the second writes the gradients. Formulas and signs
are those of the torch kernel (``rows.py``); what differs is how the sums are accumulated:

* Every lane keeps its own softmax over the columns it sees, so the pass needs no barrier between tiles.
* The differences d = z - z' are summed relative to a centre, d at the most probable class so far. A shift shared by
  the whole row then costs no digits. The centre moves when the maximum does, and the sums move with it, exactly.
* The label stays out of the sums and joins at the end, so that L - z_y and p_y - 1 keep their digits as p_y -> 1.
* Next to the sums that are accurate for close rows, there is a softmax of the noised row, for rows far apart.

Rows start at multiples of ``ROW_MULTIPLE`` elements, and are read and written up to the next multiple, past their
last class. So every load has 16 bytes for any V, and one compilation serves every number of rows and classes.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (Triton's language has no types: pyright takes its return values for None, and launch options for mistakes.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from swaft.noise.loss.rows import ROW_MULTIPLE, RowGradients, RowInputs, RowStatistics

if TYPE_CHECKING:
    from swaft.noise.loss.options import LossOptions

WARPS = 8
"""Warps per program."""
REGISTERS = 128
"""Maximum registers per thread: two programs of 8 warps then fit on a multiprocessor."""

_UNIT = tl.constexpr(ROW_MULTIPLE)
_LANES = tl.constexpr(128 * WARPS)
"""Lanes of a tile: 4 fp32 numbers per thread, one load of 16 bytes. A tile holds a few numbers of each lane, which
are reduced within the thread; with more numbers or more lanes, there are not enough registers."""
_BLOCK = tl.constexpr(2 * 128 * WARPS)
"""Columns per iteration of the second pass."""
_NEAR = tl.constexpr(0.5)
"""Rows with |t| below this use the sums that are accurate for close rows."""
_NOTHING = tl.constexpr(-1e30)
"""Maximum of a lane that has seen no column; finite, so that differences of maxima are not NaN."""
_NONE = tl.constexpr(float("-inf"))
"""Logit of a column that does not exist."""
_LOG2E = tl.constexpr(1.4426950408889634)
_SMALL = tl.constexpr(0.25)
"""Below this, exp(x) - 1 uses a series; above, the subtraction costs two bits at most."""


# Elementary functions that keep their digits near zero. CUDA's own cannot be called under Triton's interpreter, and
# its fast logarithm has an absolute error of 2^-22, too much for numbers near 1.


@triton.jit
def _exp(x):
    """e^x, to 2e-7 relative; 0 at -inf."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _expm1_series(x):
    """exp(x) - 1 for |x| < 1/4, by its series; relative error 5e-8."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))


@triton.jit
def _one_minus_exp(x, e):
    """1 - exp(-x) for x >= 0, given e = exp(-x)."""
    return tl.where(x < _SMALL, -_expm1_series(-x), 1 - e)


@triton.jit
def _log1p(x):
    """log(1 + x) = 2 atanh(x / (2 + x)) for -1/2 <= x <= 1, by its series; relative error 1e-8."""
    s = x / (2 + x)
    s2 = s * s
    tail = 1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 * (1 / 15 + s2 * (1 / 17))))
    return 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * tail))))


@triton.jit
def _softcap(z, d, cap):
    """The soft-cap cap tanh(z / cap) of both rows: logits, clean minus noised, and the two slopes.

    With e_v = exp(-2 |v|), a = z / cap and b = (z - d) / cap, no term is a difference of rounded numbers:
    tanh a - tanh b = sinh(a - b) / (cosh a cosh b)
                    = 2 sign(a - b) exp(|a - b| - |a| - |b|) (1 - e_{a - b}) / ((1 + e_a)(1 + e_b)),
    1 - tanh(a)^2 = 4 e_a / (1 + e_a)^2.
    """
    a, difference = z / cap, d / cap
    b = a - difference
    size_a, size_b, width = tl.abs(a), tl.abs(b), tl.abs(difference)
    e_a, e_b, e_width = _exp(-2 * size_a), _exp(-2 * size_b), _exp(-2 * width)
    half_a, half_b = 1 / (1 + e_a), 1 / (1 + e_b)
    tanh = _one_minus_exp(2 * size_a, e_a) * half_a
    gap = 2 * _exp(width - size_a - size_b) * _one_minus_exp(2 * width, e_width) * (half_a * half_b)
    return (
        cap * tl.where(a < 0, -tanh, tanh),
        cap * tl.where(difference < 0, -gap, gap),
        4 * e_a * (half_a * half_a),
        4 * e_b * (half_b * half_b),
    )


@triton.jit
def _logits(raw, raw_noise, bias, columns, mask, scale, cap, DIRECT: tl.constexpr, CAPPED: tl.constexpr):
    """Logits, clean minus noised, and slopes of the soft-cap. Columns that are -inf in both rows differ by 0."""
    z = tl.load(raw + columns, mask=mask, other=_NONE)
    noise = tl.load(raw_noise + columns, mask=mask, other=_NONE)
    d = tl.where(z == noise, 0.0, z - noise) if DIRECT else tl.where(z == _NONE, 0.0, -noise)
    z *= scale
    d *= scale
    if bias is not None:
        z += tl.load(bias + columns, mask=mask, other=0.0)
    if CAPPED:
        z, d, slope, noised_slope = _softcap(z, d, cap)
    else:
        slope, noised_slope = 1.0, 1.0
    return z, d, slope, noised_slope


@triton.jit
def _recentred(S, A, T, U, noised_S, noised_A, decay, growth, shift):
    """The sums with all clean weights times ``decay`` and the centre moved by ``shift``.

    growth = decay exp(shift) is an argument, since decay may be 0 where growth is not.
    """
    gain = tl.where(
        tl.abs(shift) < _SMALL, decay * _expm1_series(shift), growth - decay
    )  # decay expm1(shift)
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
    label = _exp(log_label)
    likely = others <= label
    return tl.where(likely, _log1p(tl.where(likely, others / label, 0.0)), tl.log(others + label) - log_label)


@triton.jit(
    do_not_specialize=["num_classes", "product_stride", "gradient_stride"],
    do_not_specialize_on_alignment=["labels", "ce_weights", "kl_weights", "statistics"],
)
def _rows_kernel(
    raw, raw_noise,  # (R, V) fp32, rows product_stride * ROW_MULTIPLE elements apart
    bias,  # (V,) fp32, to the next ROW_MULTIPLE; or None
    labels, ce_weights, kl_weights,  # (R,): int64, fp32, fp32
    clean_gradient, noised_gradient, total_gradient,  # (R, V) of any floating dtype, or None; gradient_stride apart
    statistics,  # (R, 4) fp32: CE, J, L, L'
    num_classes, product_stride, gradient_stride,  # V; strides in ROW_MULTIPLE
    scale, cap, smoothing, z_loss,  # numbers of LossOptions; cap is 1 without a soft-cap
    DIRECT: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, CE_ON_NOISED: tl.constexpr,  # ``variant``
    DETACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    raw += row * product_stride * _UNIT
    raw_noise += row * product_stride * _UNIT
    ce_weight = tl.load(ce_weights + row)
    kl_weight = tl.load(kl_weights + row)
    counts = (ce_weight != 0) | (kl_weight != 0)
    width = tl.cdiv(num_classes, _UNIT) * _UNIT
    readable = tl.where(counts, width, 0)  # nothing is read of rows that do not count
    scale = tl.cast(scale, tl.float32)
    cap = tl.cast(cap, tl.float32)
    smoothing = tl.cast(smoothing, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < num_classes)
    label_z, label_d, _label_slope, _label_noised_slope = _logits(
        raw, raw_noise, bias, label, valid & counts, scale, cap, DIRECT, CAPPED
    )
    label_z = tl.where(valid, label_z, _NONE)
    label = tl.where(valid, label, -1).to(tl.int32)

    # Pass 1. Relative to a lane's maximum m and centre c:  w = exp(z - m), x = d - c, and
    # S = sum w, A = sum w x, T = sum w expm1(-x), U = sum w x expm1(-x);
    # of the noised row, whose log weights are z - m - x and whose largest is mu: noised_S, noised_A = sum .. x.
    tile = tl.arange(0, TILE)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    m = tl.full([_LANES], _NOTHING, tl.float32)
    mu = tl.full([_LANES], _NOTHING, tl.float32)
    c = tl.zeros([_LANES], tl.float32)
    S = tl.zeros([_LANES], tl.float32)
    A = tl.zeros([_LANES], tl.float32)
    T = tl.zeros([_LANES], tl.float32)
    U = tl.zeros([_LANES], tl.float32)
    noised_S = tl.zeros([_LANES], tl.float32)
    noised_A = tl.zeros([_LANES], tl.float32)
    sum_z = tl.zeros([_LANES], tl.float32)
    sum_d = tl.zeros([_LANES], tl.float32)
    for start in range(0, num_classes, TILE * _LANES):
        columns = start + tile
        z, d, _slope, _noised_slope = _logits(
            raw, raw_noise, bias, columns, columns < readable, scale, cap, DIRECT, CAPPED
        )
        there = columns < num_classes
        d = tl.where(there, d, 0.0)
        if SMOOTHED:
            sum_z += tl.sum(tl.where(there, z, 0.0), 0)
            if CE_ON_NOISED:
                sum_d += tl.sum(d, 0)
        z = tl.where(there & (columns != label), z, _NONE)

        highest = tl.max(z, 0)
        centre = tl.max(tl.where(z == highest[None, :], d, _NONE), 0)
        centre = tl.where(highest > m, centre, c)
        highest = tl.maximum(highest, m)
        rise, shift = highest - m, centre - c
        S, A, T, U, noised_A = _recentred(
            S, A, T, U, noised_S, noised_A, _exp(-rise), _exp(shift - rise), shift
        )
        m, c = highest, centre
        mu += shift - rise

        from_m = z - m[None, :]
        x = d - c[None, :]
        noised_from_m = from_m - x
        noised_highest = tl.maximum(mu, tl.max(noised_from_m, 0))
        fade = _exp(mu - noised_highest)
        mu = noised_highest
        w = _exp(from_m)
        noised_w = _exp(noised_from_m - mu[None, :])
        change = tl.where(  # w expm1(-x)
            tl.abs(x) < _SMALL, w * _expm1_series(-x), noised_w * _exp(mu)[None, :] - w
        )
        S += tl.sum(w, 0)
        A += tl.sum(w * x, 0)
        T += tl.sum(change, 0)
        U += tl.sum(change * x, 0)
        noised_S = noised_S * fade + tl.sum(noised_w, 0)
        noised_A = noised_A * fade + tl.sum(noised_w * x, 0)

    # The lanes and the label, brought to a common maximum M and centre C.
    highest = tl.max(m, 0)
    C = tl.where(label_z >= highest, label_d, tl.max(tl.where(m == highest, c, _NONE), 0))
    M = tl.maximum(highest, label_z)
    rise, shift = M - m, C - c
    S, A, T, U, noised_A = _recentred(S, A, T, U, noised_S, noised_A, _exp(-rise), _exp(shift - rise), shift)
    mu += shift - rise
    log_label = label_z - M
    noised_log_label = log_label + (C - label_d)
    label_S, label_A, label_T, label_U, label_noised_A = _recentred(
        1.0, 0.0, 0.0, 0.0, 1.0, 0.0, _exp(log_label), _exp(noised_log_label), C - label_d
    )
    others = tl.sum(S, 0)
    S_row = others + label_S
    a = (tl.sum(A, 0) + label_A) / S_row
    t = (tl.sum(T, 0) + label_T) / S_row
    u = (tl.sum(U, 0) + label_U) / S_row
    noised_highest = tl.maximum(tl.max(mu, 0), noised_log_label)
    fade = _exp(mu - noised_highest)
    noised_log_label -= noised_highest
    label_noised_w = _exp(noised_log_label)
    noised_others = tl.sum(noised_S * fade, 0)
    noised_S_row = noised_others + label_noised_w
    noised_a = (tl.sum(noised_A * fade, 0) + label_noised_A * label_noised_w) / noised_S_row

    # J = E_p[d] - E_q[d]; offset = log p - log q - x.
    near = tl.abs(t) < _NEAR
    J = tl.where(near, tl.maximum((a * t - u) / (1 + t), 0.0), a - noised_a)
    offset = tl.where(near, _log1p(tl.where(near, t, 0.0)), noised_highest + tl.log(noised_S_row / S_row))
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
    # A label that counts but is out of range makes the loss NaN; no error can be raised from here.
    cross_entropy = tl.where(valid, cross_entropy, float("nan"))
    statistics += 4 * row
    tl.store(statistics, tl.where(ce_weight != 0, cross_entropy, 0.0))
    tl.store(statistics + 1, tl.where(counts, J, 0.0))
    tl.store(statistics + 2, tl.where(counts, L, 0.0))
    tl.store(statistics + 3, tl.where(counts, noised_L, 0.0))

    # Pass 2, with P = p - q:  dJ/dz = p (x - a) + P,  dJ/dz' = -(q (x - a') + P),  a' = E_q[x], and their sum
    # (x - a) P - J q, which is of second order in the difference and must not be computed by subtraction.
    if clean_gradient is not None:
        inverse_S, inverse_noised_S = 1 / S_row, 1 / noised_S_row
        p_y_minus_1, q_y_minus_1 = -others / S_row, -noised_others / noised_S_row  # p_y - 1, q_y - 1
        per_class = smoothing / num_classes
        for start in range(0, num_classes, _BLOCK):
            columns = start + tl.arange(0, _BLOCK)
            mask = columns < width
            z, d, slope, noised_slope = _logits(
                raw, raw_noise, bias, columns, columns < readable, scale, cap, DIRECT, CAPPED
            )
            x = d - C
            p = _exp(z - M) * inverse_S
            q = _exp(z - M - x - noised_highest) * inverse_noised_S
            log_ratio = x + offset
            P = tl.where(tl.abs(log_ratio) < _SMALL, -p * _expm1_series(-log_ratio), p - q)
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
            at = row * gradient_stride * _UNIT + columns
            tl.store(clean_gradient + at, tl.where(counts, g * scale, 0.0), mask=mask)
            if noised_gradient is not None:
                tl.store(noised_gradient + at, tl.where(counts, noised_g * scale, 0.0), mask=mask)
            if total_gradient is not None:
                tl.store(total_gradient + at, tl.where(counts, sum_g * scale, 0.0), mask=mask)


def rows(inputs: RowInputs, options: LossOptions, gradients: RowGradients | None) -> RowStatistics:
    """Value of every row and, if buffers are given, its gradients; the counterpart of the kernel in ``rows.py``.

    Args:
        inputs: the rows, fp32, both products laid out as by ``empty_rows``; not modified.
        options: what is computed.
        gradients: buffers (R, V) of one floating dtype, laid out the same way, separate from the products; None:
            statistics only.

    Returns:
        Statistics of the rows, (R,) each, fp32.
    """
    raw, raw_noise = inputs.raw, inputs.raw_noise
    num_rows, num_classes = raw.shape
    statistics = torch.empty((num_rows, 4), dtype=torch.float32, device=raw.device)
    bias = inputs.bias
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, -num_classes % ROW_MULTIPLE))
    if num_rows:
        clean, noised, total = gradients or (None, None, None)
        with torch.cuda.device_of(raw):
            _rows_kernel[(num_rows,)](
                raw,
                raw_noise,
                bias,
                *(each.contiguous() for each in (inputs.labels, inputs.ce_weight, inputs.kl_weight)),
                *(clean, noised, total, statistics),
                num_classes,
                _row_stride(raw, raw_noise),
                _row_stride(clean, noised, total),
                scale=float(options.logit_scale),
                cap=1.0 if options.softcap is None else float(options.softcap),
                smoothing=float(options.label_smoothing),
                z_loss=float(options.z_loss),
                **variant(options),
                num_warps=WARPS,
                **({} if torch.version.hip else {"maxnreg": REGISTERS}),
            )
    return RowStatistics(*statistics.unbind(1))


def variant(options: LossOptions) -> dict[str, Any]:
    """Compile-time arguments of the kernel: what changes its code, apart from arguments that are None."""
    return {
        "DIRECT": options.form == "direct",
        "CAPPED": options.softcap is not None,
        "SMOOTHED": options.label_smoothing != 0.0,
        "CE_ON_NOISED": options.ce_on_noised,
        "DETACH": options.detach,
        "TILE": 4 if options.softcap is None else 2,
    }


def _row_stride(*matrices: torch.Tensor | None) -> int:
    """The common row stride of matrices, in units of ``ROW_MULTIPLE``; 0 without matrices."""
    strides = {matrix.stride(0) for matrix in matrices if matrix is not None}
    assert len(strides) <= 1, "matrices whose rows lie differently far apart"
    stride = max(strides, default=0)
    assert stride % ROW_MULTIPLE == 0, "rows that do not begin at multiples of ROW_MULTIPLE"
    return stride // ROW_MULTIPLE
