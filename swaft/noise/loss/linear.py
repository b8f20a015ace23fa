"""A language-model head and the loss of its logits, a chunk of rows at a time: no (N, V) tensor is ever created.

Gradients are computed in the forward pass, while a chunk's logits exist. Per chunk of R rows, stacked so that three
matrix products suffice (h, h' hidden states, W the weight; G, G' gradients with respect to the two products):

    [noise; raw] = [h' - h; h] W^T    or [noised; raw] = [h'; h] W^T in the direct form
    [dh; dh'] = [G; G'] W
    dW += [G'; G + G']^T [h' - h; h]

dW is G^T h + G'^T h'. But G and G' are rounded to 16 bits and nearly cancel, so this plain sum would lose its
accuracy. Therefore the row kernel also returns G + G'.

On an accelerator, the first product and the row kernel take a few rows of the chunk at a time, which leaves more of
the memory for gradients. Every chunk reads and writes the whole of dW, so fewer, larger chunks do this less often.
``benchmarks/fused_loss_model.py`` predicts the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from swaft.environment import has_triton
from swaft.noise.loss import rows as torch_rows
from swaft.noise.loss.options import LossOptions, wide_dtype
from swaft.noise.loss.rows import RowGradients, RowInputs, RowStatistics, empty_rows, task_rows

_CPU_CHUNK_BYTES = 96 * 2**20
"""Memory of a chunk on a CPU: 256 rows at 32k classes in fp32, enough for the products to run at full speed."""
_ACCELERATOR_CHUNK_BYTES = 1_800_000_000
"""Memory of a chunk on other devices: about 4096 rows at 50k classes."""
_ROWS_MULTIPLE = 128
_PRODUCT_ROWS = 256
"""Rows of a chunk that are multiplied at a time on an accelerator, with both passes in one product. This is the
smallest number at which the product does not wait for W, and one wave of the row kernel: two of its programs fit on
each of an H100's 132 multiprocessors."""
_PIECE = 2**24
"""Elements of a gradient that are scaled at a time."""


RowKernel = Callable[[RowInputs, LossOptions, RowGradients | None], RowStatistics]
"""A function like ``swaft.noise.loss.rows.rows``."""


def row_kernel(device: torch.device, dtype: torch.dtype) -> RowKernel:
    """Pick the kernel for a device: Triton's on CUDA in fp32, if Triton is installed; otherwise torch's.

    Args:
        device: where the logits are.
        dtype: of the logits; Triton's kernel has no float64.
    """
    if device.type == "cuda" and dtype == torch.float32 and has_triton():
        from swaft.noise.loss.rows_triton import rows as triton_rows

        return triton_rows
    return torch_rows.rows


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    noised_hidden: bool
    weight: bool
    bias: bool


class LinearLoss(NamedTuple):
    """Loss, row statistics and gradients of the loss; gradients that are not needed are empty."""

    loss: Tensor
    statistics: Tensor
    """``RowStatistics`` of all rows, (4, N)."""
    hidden: Tensor
    noised_hidden: Tensor
    weight: Tensor
    bias: Tensor


class LinearInputs(NamedTuple):
    """The operands of a head and the weights of its rows."""

    hidden: Tensor
    """h (N, d)."""
    noised_hidden: Tensor
    """h' (N, d)."""
    hidden_difference: Tensor | None
    """h - h' (N, d), if known more accurately than by subtraction."""
    weight: Tensor
    """W (V, d)."""
    bias: Tensor | None
    """b (V,)."""
    labels: Tensor
    """(N,), see ``RowWeights``."""
    ce_weight: Tensor
    """(N,), without the factor."""
    kl_weight: Tensor
    """(N,), without the factor."""
    factor: Tensor
    """Common factor of all rows, 0-dim; applied to sums in full precision."""


def linear_loss(
    inputs: LinearInputs,
    options: LossOptions,
    needs: Needs,
    *,
    operand_dtype: torch.dtype,
    num_counted: int | None = None,
    chunk_bytes: int | None = None,
) -> LinearLoss:
    """Loss of a head, with the requested gradients.

    loss = factor * sum_rows [ce (CE + k L^2) + kl J]

    Args:
        inputs: operands and row weights.
        options: of the loss.
        needs: which gradients are wanted; if none, only statistics are computed.
        operand_dtype: dtype that the operands of matrix products are rounded to; sums are fp32 (float64 for
            float64). With float16, this applies to hidden states and weight; gradients do not fit its range, see
            ``_Arithmetic``.
        num_counted: upper bound on the number of rows that count, if the host knows one. The loss is NaN if more
            do.
        chunk_bytes: memory for everything of size V in a chunk.
    """
    index, factor = _counted_rows(inputs, num_counted)
    chunks = _Chunks(inputs, options, needs, _Arithmetic.of(inputs.hidden.device, operand_dtype), factor)
    chunks.take(index, chunk_bytes)
    return chunks.result()


@dataclass(frozen=True)
class _Arithmetic:
    """The dtypes that a device computes in."""

    given: torch.dtype
    """Dtype of hidden states and weight."""
    wide: torch.dtype
    """Dtype of logits, statistics and sums."""
    gradient: torch.dtype
    """Dtype of gradients and differences. They do not fit the range of fp16, so with fp16 operands it is bf16."""
    narrow: bool
    """Whether 16-bit matrices are multiplied directly into an fp32 result; only on CUDA."""
    rows: RowKernel

    @staticmethod
    def of(device: torch.device, operand_dtype: torch.dtype) -> _Arithmetic:
        wide = torch.promote_types(operand_dtype, torch.float32)
        narrow = device.type == "cuda"
        in_bf16 = operand_dtype == torch.bfloat16 or (narrow and operand_dtype == torch.float16)
        gradient = torch.bfloat16 if in_bf16 else wide
        return _Arithmetic(operand_dtype, wide, gradient, narrow, row_kernel(device, wide))

    @property
    def in_place(self) -> bool:
        """Whether gradients overwrite the logits they are computed from."""
        return self.rows is torch_rows.rows and not (self.narrow and self.gradient != self.wide)

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, rounded, as an operand of products."""
        return tensor.to(dtype) if self.narrow else tensor.to(dtype).to(self.wide)

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        if a.dtype == self.wide:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.wide, out=out)

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        beta = 0 if first else 1  # with 0, the old content is not even read
        if a.dtype == self.wide:
            total.addmm_(a, b, beta=beta)
        else:
            torch.addmm(total, a, b, beta=beta, out_dtype=self.wide, out=total)

    def round_(self, slab: Tensor) -> None:
        """Round gradients that the row kernel has left in a wider dtype than the products should use."""
        if slab.dtype != self.gradient:
            for block in slab.split(_ROWS_MULTIPLE // 16):
                block.copy_(block.to(self.gradient))


class _Buffers:
    """The memory of size V of one chunk, reused by every chunk.

    Gradients are [G; G'; G + G'], or only G if the noised pass has none. In place, they share memory with the
    products [noise; raw], in an order in which the row kernel can overwrite them.
    """

    def __init__(
        self, parts: int, arithmetic: _Arithmetic, weight: Tensor, count: int, chunk_bytes: int | None
    ) -> None:
        classes, wide = weight.shape[0], arithmetic.wide
        left = chunk_bytes or (_CPU_CHUNK_BYTES if weight.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES)

        def fitting(row_bytes: int, multiple: int = _ROWS_MULTIPLE) -> int:
            return max(1, min(count, max(left // row_bytes // multiple * multiple, multiple)))

        self._parts, self._in_place = parts, arithmetic.in_place
        if self._in_place:
            held = max(2, parts)
            self.rows = self.product_rows = fitting(held * wide.itemsize * classes)
            memory = torch.empty(held * self.rows, classes, dtype=wide, device=weight.device)
            self._products = self._gradients = memory
            return
        dtype = arithmetic.gradient if arithmetic.narrow else wide
        products, gradients = 2 * wide.itemsize * classes, parts * dtype.itemsize * classes
        self.rows = self.product_rows = min(fitting(products + gradients), _PRODUCT_ROWS)
        if parts:
            left -= self.product_rows * products
            self.rows = fitting(gradients, self.product_rows)
        self._products = empty_rows(2 * self.product_rows, classes, dtype=wide, device=weight.device)
        self._gradients = empty_rows(parts * self.rows, classes, dtype=dtype, device=weight.device)

    def products(self, rows: int) -> Tensor:
        """The memory for the products of ``rows`` rows (2R, V)."""
        start = rows if self._in_place and self._parts == 3 else 0
        return self._products[start : start + 2 * rows]

    def slab(self, rows: int) -> Tensor:
        """[G; G'; G + G'] of a chunk (3R, V), or G (R, V)."""
        start = rows if self._in_place and self._parts == 1 else 0
        return self._gradients[start : start + self._parts * rows]

    def gradients(self, rows: int, few: slice) -> RowGradients | None:
        """The parts of the slab, restricted to a few rows; None if only statistics are computed."""
        if not self._parts:
            return None
        clean, *others = self.slab(rows).unflatten(0, (self._parts, rows))[:, few]
        return RowGradients(clean, *(others or (None, None)))


class _Chunks:
    """Processes chunks of rows one after the other and adds up their results."""

    def __init__(
        self,
        inputs: LinearInputs,
        options: LossOptions,
        needs: Needs,
        arithmetic: _Arithmetic,
        factor: Tensor,
    ) -> None:
        self.inputs, self.options, self.needs = inputs, options, needs
        self.arithmetic, self.factor = arithmetic, factor
        count, device, wide = inputs.hidden.shape[0], inputs.hidden.device, arithmetic.wide

        def zeros(like: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
            return torch.zeros(like.shape if needed else (0,), dtype=dtype, device=device)

        self.statistics = torch.zeros(4, count, dtype=wide, device=device)
        hidden, noised_hidden = inputs.hidden, inputs.noised_hidden
        self.hidden = zeros(hidden, needs.hidden, stored_dtype(hidden.dtype))
        self.noised_hidden = zeros(noised_hidden, needs.noised_hidden, stored_dtype(noised_hidden.dtype))
        self.weight = torch.empty(inputs.weight.shape if needs.weight else (0,), dtype=wide, device=device)
        self.bias = zeros(inputs.weight[:, 0], needs.bias, wide)

    def take(self, index: Tensor | None, chunk_bytes: int | None) -> None:
        """Compute the rows with these indices (None: all); the memory of the chunks is freed afterwards."""
        inputs, arithmetic = self.inputs, self.arithmetic
        count = inputs.hidden.shape[0] if index is None else index.numel()
        if count == 0:
            self.weight.zero_()
        parts = 0 if not any(self.needs) else (3 if self.options.noised_moves else 1)
        buffers = _Buffers(parts, arithmetic, inputs.weight, count, chunk_bytes)
        given = inputs.weight.to(arithmetic.given)
        weight = arithmetic.operand(given, arithmetic.given)
        # Gradients and fp16 hidden states are multiplied by weights of different dtypes.
        back_weight = (
            arithmetic.operand(given, arithmetic.gradient) if arithmetic.narrow and parts else weight
        )
        bias = None if inputs.bias is None else inputs.bias.to(arithmetic.wide)

        def numbers(start: int, stop: int) -> slice | Tensor:
            return slice(start, stop) if index is None else index[start:stop]

        for start in range(0, count, buffers.rows):
            stop = min(start + buffers.rows, count)
            operands, split_operands, unit = self._stacked_operands(numbers(start, stop))
            for first in range(start, stop, buffers.product_rows):
                last = min(first + buffers.product_rows, stop)
                few, chosen = slice(first - start, last - start), numbers(first, last)
                products = buffers.products(last - first)
                arithmetic.product(operands[:, few].flatten(0, 1), weight.mT, out=products)
                raw_noise, raw = products.split(last - first)
                if unit is not None:
                    raw_noise.mul_(unit[few])
                of_rows = (inputs.labels[chosen], bias, inputs.ce_weight[chosen], inputs.kl_weight[chosen])
                gradients = buffers.gradients(stop - start, few)
                statistics = arithmetic.rows(RowInputs(raw, raw_noise, *of_rows), self.options, gradients)
                self.statistics[:, chosen] = torch.stack(statistics)
            if parts:
                slab = buffers.slab(stop - start)
                arithmetic.round_(slab)
                self._multiply_back(slab, back_weight, numbers(start, stop), split_operands, first=start == 0)

    def _stacked_operands(self, chosen: slice | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operands that the weight is multiplied by, and [h' - h; h] for its gradient, both (2, R, d).

        Everything is rounded once; the difference is rounded after it is taken. Differences can be too small for
        fp16. On a CPU, they are not rounded to fp16. On devices that multiply in fp16, each row of differences is
        divided by its own unit, a power of two (R, 1), and the product must be multiplied by that unit.
        """
        inputs, arithmetic = self.inputs, self.arithmetic
        hidden, noised_hidden = inputs.hidden[chosen], inputs.noised_hidden[chosen]
        if inputs.hidden_difference is not None:
            noise = inputs.hidden_difference[chosen].neg()
        else:
            wide = wide_dtype(hidden, noised_hidden)
            noise = noised_hidden.to(wide) - hidden.to(wide)
        hidden, given = hidden.to(arithmetic.given), arithmetic.given
        split = torch.stack([arithmetic.operand(each, arithmetic.gradient) for each in (noise, hidden)])
        if self.options.form == "direct":
            whole = torch.stack([arithmetic.operand(each, given) for each in (noised_hidden, hidden)])
            return whole, split, None
        if not arithmetic.narrow or given == arithmetic.gradient:
            return split, split, None
        exponent = torch.frexp(noise.float().abs().amax(-1, keepdim=True)).exponent
        unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(min=-100) - 14)
        return torch.stack([(noise / unit).to(given), hidden]), split, unit

    def _multiply_back(
        self, slab: Tensor, weight: Tensor, chosen: slice | Tensor, split_operands: Tensor, *, first: bool
    ) -> None:
        """Propagate a chunk's gradients to hidden states, weight and bias."""
        rows, arithmetic, moves = split_operands.shape[1], self.arithmetic, self.options.noised_moves
        clean, noised = self.needs.hidden, self.needs.noised_hidden and moves
        begin, end = (0 if clean else rows), (2 * rows if noised else rows)
        if begin < end:
            products = torch.empty(end - begin, weight.shape[1], dtype=arithmetic.wide, device=weight.device)
            arithmetic.product(slab[begin:end], weight, out=products).mul_(self.factor)
            if clean:
                self.hidden[chosen] = products[:rows].to(self.hidden.dtype)
            if noised:
                self.noised_hidden[chosen] = products[-rows:].to(self.noised_hidden.dtype)
        if self.needs.weight:
            operands = split_operands.flatten(0, 1) if moves else split_operands[1]
            arithmetic.add_product_(self.weight, slab[-2 * rows :].mT, operands, first=first)
        if self.needs.bias:
            self.bias.add_(slab[-rows:].sum(0, dtype=arithmetic.wide), alpha=1 / self.options.logit_scale)

    def result(self) -> LinearLoss:
        """The loss, and gradients including the common factor, in the dtypes they are stored in."""
        inputs, statistics = self.inputs, RowStatistics(*self.statistics)
        task = inputs.ce_weight * task_rows(statistics, self.options)
        loss = self.factor * (task + inputs.kl_weight * statistics.divergence).sum()

        def scaled(sums: Tensor, like: Tensor | None) -> Tensor:
            if like is None or stored_dtype(like.dtype) == sums.dtype:
                return sums.mul_(self.factor)
            return times(sums, self.factor, stored_dtype(like.dtype))

        weight, bias = scaled(self.weight, inputs.weight), scaled(self.bias, inputs.bias)
        return LinearLoss(loss, self.statistics, self.hidden, self.noised_hidden, weight, bias)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a gradient is stored in until backward: its own, or fp32 if a loss scale must be applied first."""
    return torch.float32 if dtype == torch.float16 else dtype


def times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product with a 0-dim fp32 factor, in a dtype of less or equal width, rounded once, in pieces.

    The factor is given a dimension; otherwise torch would, on a GPU, round it to the dtype of a 16-bit gradient
    first: up to 0.2 % off, in every element. This way, one operation reads, multiplies and rounds, and only the
    result has the gradient's size.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, _PIECE // max(1, gradient[:1].numel()))
    for piece, target in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(piece, factor.reshape(1), out=target)
    return out


def _counted_rows(inputs: LinearInputs, num_counted: int | None) -> tuple[Tensor | None, Tensor]:
    """Indices of the rows to compute (None: all), and the factor, NaN if ``num_counted`` was too small."""
    counted = (inputs.ce_weight != 0) | (inputs.kl_weight != 0)
    factor = inputs.factor
    if num_counted is not None:
        factor = torch.where(counted.sum() <= num_counted, factor, torch.nan)
    if counted.device.type == "cpu":
        index = counted.nonzero().squeeze(-1)
        return (None if index.numel() == counted.numel() else index), factor
    return counted_first(counted, num_counted), factor


def counted_first(counted: Tensor, num_counted: int | None) -> Tensor | None:
    """Indices of the first ``num_counted`` rows, with counted rows moved to the front; None for all rows.

    This uses a sort instead of a search, so that the host does not wait for the number of counted rows.
    """
    if num_counted is None or num_counted >= counted.numel():
        return None
    return torch.argsort(~counted, stable=True)[:num_counted]
