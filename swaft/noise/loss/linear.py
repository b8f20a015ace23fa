"""A language-model head and the loss of its logits, a chunk of rows at a time: no (N, V) tensor is ever made.

Gradients come with the forward pass, while a chunk's logits are there. Per chunk of R rows, stacked so that
three matrix products do (h, h' hidden states, W the weight; G, G' gradients of the rows' two products):

    [noise; raw] = [h' - h; h] W^T    or [noised; raw] = [h'; h] W^T in the direct form
    [dh; dh'] = [G; G'] W
    dW += [G'; G + G']^T [h' - h; h]

dW is G^T h + G'^T h', but as that plain sum it does not survive that G and G' are rounded to 16 bits where they
nearly cancel; so the row kernel gives G + G' as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from swaft.noise.loss import rows as torch_rows
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowGradients, RowInputs, RowStatistics, task_rows

_CPU_CHUNK_BYTES = 96 * 2**20
"""What a chunk may take on a CPU: 256 rows at 32k classes in fp32, where the products run at full speed."""
_ACCELERATOR_CHUNK_BYTES = 1_800_000_000
"""What a chunk may take elsewhere: some 2048 rows at 50k classes, so that products are not launch-bound."""
_ROWS_MULTIPLE = 128


RowKernel = Callable[[RowInputs, LossOptions, RowGradients | None], RowStatistics]
"""A function like ``swaft.noise.loss.rows.rows``."""


def row_kernel(device: torch.device, dtype: torch.dtype) -> RowKernel:
    """Pick the kernel of a device: Triton's on CUDA in fp32, where Triton is installed; else torch's.

    Args:
        device: where the logits are.
        dtype: of the logits; Triton's kernel has no float64.
    """
    if device.type == "cuda" and dtype == torch.float32 and has_triton():
        from swaft.noise.loss.rows_triton import rows as triton_rows

        return triton_rows
    return torch_rows.rows


@cache
def has_triton() -> bool:
    """Whether a GPU's kernels can be compiled here; without Triton the same comes of plain operations."""
    return find_spec("triton") is not None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    noised_hidden: bool
    weight: bool
    bias: bool


class LinearLoss(NamedTuple):
    """Loss, row statistics (N,) and gradients of the loss; gradients not wanted are empty."""

    loss: Tensor
    statistics: RowStatistics
    hidden: Tensor
    noised_hidden: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LinearInputs:
    """The operands of a head and the weights of its rows."""

    hidden: Tensor
    """h (N, d)."""
    noised_hidden: Tensor
    """h' (N, d)."""
    hidden_difference: Tensor | None
    """h - h' (N, d), if known better than by subtraction."""
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
    """Loss of a head, with the gradients wanted.

    loss = factor * sum_rows [ce (CE + k L^2) + kl J]

    Args:
        inputs: operands and row weights.
        options: of the loss.
        needs: which gradients are wanted; without one only statistics are computed.
        operand_dtype: what the operands of matrix products are rounded to; sums are fp32 (float64 for
            float64). float16 rounds hidden states and weight only: gradients leave its range.
        num_counted: upper bound of the rows that count, if the host knows one. The loss is NaN when more do.
        chunk_bytes: what everything of size V in a chunk may take.
    """
    index, factor = _counted_rows(inputs, num_counted)
    arithmetic = _Arithmetic.of(inputs.hidden.device, operand_dtype)
    return _Chunks(inputs, options, needs, arithmetic, factor).take(index, chunk_bytes).result()


@dataclass(frozen=True)
class _Arithmetic:
    """The types that a device computes in."""

    given: torch.dtype
    """What hidden states and weight are rounded to."""
    wide: torch.dtype
    """Logits, statistics and sums."""
    operand: torch.dtype
    """What matrix products take."""
    rounding: torch.dtype
    """What gradients are rounded to before they are multiplied."""
    rows: RowKernel

    @staticmethod
    def of(device: torch.device, operand_dtype: torch.dtype) -> _Arithmetic:
        wide = torch.promote_types(operand_dtype, torch.float32)
        rounding = torch.bfloat16 if operand_dtype == torch.bfloat16 else wide
        # Only CUDA multiplies 16-bit matrices into an fp32 result.
        operand = rounding if device.type == "cuda" else wide
        return _Arithmetic(operand_dtype, wide, operand, rounding, row_kernel(device, wide))

    @property
    def in_place(self) -> bool:
        """Whether gradients take the place of the logits they come from."""
        return self.rows is torch_rows.rows and self.operand == self.wide

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        if self.operand == self.wide:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.wide, out=out)

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if self.operand == self.wide:
            total.addmm_(a, b)
        else:
            torch.addmm(total, a, b, out_dtype=self.wide, out=total)

    def round_(self, slab: Tensor) -> None:
        """Round what the row kernel left in wider numbers than the product is to see."""
        if slab.dtype != self.rounding:
            for block in slab.split(max(1, _ROWS_MULTIPLE // 16)):
                block.copy_(block.to(self.rounding))


class _Buffers:
    """The memory of size V of one chunk, used again by every chunk.

    Gradients are [G; G'; G + G'], or G alone where the noised pass has none. In place they share memory with the
    products [noise; raw], in the order in which the row kernel can overwrite them.
    """

    def __init__(
        self,
        inputs: LinearInputs,
        options: LossOptions,
        needs: Needs,
        arithmetic: _Arithmetic,
        count: int,
        chunk_bytes: int | None,
    ) -> None:
        device, classes = inputs.hidden.device, inputs.weight.shape[0]
        wide, operand = arithmetic.wide, arithmetic.operand
        self._parts = 0 if not any(needs) else (3 if options.noised_moves else 1)
        in_place = arithmetic.in_place
        if in_place:
            row_bytes = max(2, self._parts) * wide.itemsize * classes
        else:
            row_bytes = (2 * wide.itemsize + self._parts * operand.itemsize) * classes
        self.rows = _chunk_rows(device, count, row_bytes, chunk_bytes)
        products = max(2, self._parts) if in_place else 2
        self._products = torch.empty(products * self.rows, classes, dtype=wide, device=device)
        self._gradients = None
        if not in_place:
            self._gradients = torch.empty(self._parts * self.rows, classes, dtype=operand, device=device)

    def products(self, rows: int) -> Tensor:
        """Where the chunk's products go (2R, V)."""
        start = rows if self._gradients is None and self._parts == 3 else 0
        return self._products[start : start + 2 * rows]

    def slab(self, rows: int) -> Tensor:
        """[G; G'; G + G'] (3R, V), or G (R, V)."""
        if self._gradients is not None:
            return self._gradients[: self._parts * rows]
        return self._products[: 3 * rows] if self._parts == 3 else self._products[rows : 2 * rows]

    def gradients(self, rows: int) -> RowGradients | None:
        """The slab's parts, each (R, V); None for statistics only."""
        if not self._parts:
            return None
        clean, *others = self.slab(rows).split(rows)
        return RowGradients(clean, *(others or (None, None)))


class _Chunks:
    """Chunks of rows, one after the other, and what they add up to."""

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

        self.statistics = RowStatistics(*(torch.zeros(count, dtype=wide, device=device) for _ in range(4)))
        self.hidden, self.noised_hidden = (
            zeros(like, needed, stored_dtype(like.dtype))
            for like, needed in ((inputs.hidden, needs.hidden), (inputs.noised_hidden, needs.noised_hidden))
        )
        self.weight = zeros(inputs.weight, needs.weight, wide)
        self.bias = zeros(inputs.weight[:, 0], needs.bias, wide)

    def take(self, index: Tensor | None, chunk_bytes: int | None) -> _Chunks:
        """Compute the rows of these numbers, or all; the memory of the chunks is free again afterwards."""
        inputs, arithmetic = self.inputs, self.arithmetic
        count = inputs.hidden.shape[0] if index is None else index.numel()
        buffers = _Buffers(inputs, self.options, self.needs, arithmetic, count, chunk_bytes)
        weight = inputs.weight.to(arithmetic.given).to(arithmetic.operand)
        bias = None if inputs.bias is None else inputs.bias.to(arithmetic.wide)
        for start in range(0, count, buffers.rows):
            part = slice(start, min(start + buffers.rows, count))
            rows = part.stop - start
            chosen = part if index is None else index[part]
            operands, split_operands = self._stacked_operands(chosen)
            products, gradients = buffers.products(rows), buffers.gradients(rows)
            arithmetic.product(operands, weight.mT, out=products)
            raw_noise, raw = products.split(rows)
            of_rows = (inputs.labels[chosen], bias, inputs.ce_weight[chosen], inputs.kl_weight[chosen])
            statistics = arithmetic.rows(RowInputs(raw, raw_noise, *of_rows), self.options, gradients)
            for values, chunk in zip(self.statistics, statistics, strict=True):
                values[chosen] = chunk
            if gradients is not None:
                slab = buffers.slab(rows)
                arithmetic.round_(slab)
                self._multiply(slab, weight, chosen, split_operands)
        return self

    def _stacked_operands(self, chosen: slice | Tensor) -> tuple[Tensor, Tensor]:
        """What the weight is multiplied with, and [h' - h; h] for its gradient, (2R, d) both.

        Everything is rounded once, the difference after it is taken; fp16 has no numbers as small as differences
        can be, so there they are not.
        """
        inputs, arithmetic = self.inputs, self.arithmetic
        hidden, noised_hidden = inputs.hidden[chosen], inputs.noised_hidden[chosen]
        if inputs.hidden_difference is not None:
            noise = inputs.hidden_difference[chosen].neg()
        else:
            wide = torch.promote_types(torch.promote_types(hidden.dtype, noised_hidden.dtype), torch.float32)
            noise = noised_hidden.to(wide) - hidden.to(wide)
        hidden = hidden.to(arithmetic.given).to(arithmetic.operand)
        split = torch.cat((noise.to(arithmetic.rounding).to(arithmetic.operand), hidden))
        if self.options.form == "difference":
            return split, split
        return torch.cat((noised_hidden.to(arithmetic.given).to(arithmetic.operand), hidden)), split

    def _multiply(self, slab: Tensor, weight: Tensor, chosen: slice | Tensor, split_operands: Tensor) -> None:
        """Multiply a chunk's gradients into those of hidden states, weight and bias."""
        rows, arithmetic, noised_moves = (
            split_operands.shape[0] // 2,
            self.arithmetic,
            self.options.noised_moves,
        )
        wanted = (
            (self.hidden, self.needs.hidden),
            (self.noised_hidden, self.needs.noised_hidden and noised_moves),
        )
        first, last = (0 if wanted[0][1] else rows), (2 * rows if wanted[1][1] else rows)
        if first < last:
            products = torch.empty(last - first, weight.shape[1], dtype=arithmetic.wide, device=weight.device)
            arithmetic.product(slab[first:last], weight, out=products).mul_(self.factor)
            pieces = iter(products.split(rows))
            for target, needed in wanted:
                if needed:
                    target[chosen] = next(pieces).to(target.dtype)
        if self.needs.weight:
            split = slice(None) if noised_moves else slice(rows, None)
            arithmetic.add_product_(self.weight, slab[-2 * rows :].mT, split_operands[split])
        if self.needs.bias:
            self.bias.add_(slab[-rows:].sum(0, dtype=arithmetic.wide), alpha=1 / self.options.logit_scale)

    def result(self) -> LinearLoss:
        """The loss, and gradients with the common factor in the types they are kept in."""
        inputs, statistics = self.inputs, self.statistics
        task = inputs.ce_weight * task_rows(statistics, self.options)
        loss = self.factor * (task + inputs.kl_weight * statistics.divergence).sum()
        weight = self.weight.mul_(self.factor).to(stored_dtype(inputs.weight.dtype))
        bias_dtype = self.bias.dtype if inputs.bias is None else stored_dtype(inputs.bias.dtype)
        bias = self.bias.mul_(self.factor).to(bias_dtype)
        return LinearLoss(loss, statistics, self.hidden, self.noised_hidden, weight, bias)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a gradient is kept in until backward: its own, or fp32 where a loss scale must come first."""
    return torch.float32 if dtype == torch.float16 else dtype


def _chunk_rows(device: torch.device, count: int, row_bytes: int, chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        chunk_bytes = _CPU_CHUNK_BYTES if device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    fitting = chunk_bytes // row_bytes // _ROWS_MULTIPLE * _ROWS_MULTIPLE
    return max(1, min(count, max(fitting, _ROWS_MULTIPLE)))


def _counted_rows(inputs: LinearInputs, num_counted: int | None) -> tuple[Tensor | None, Tensor]:
    """Numbers of the rows to compute (None: all), and the factor, NaN where ``num_counted`` was too small."""
    counted = (inputs.ce_weight != 0) | (inputs.kl_weight != 0)
    factor = inputs.factor
    if num_counted is not None:
        factor = torch.where(counted.sum() <= num_counted, factor, torch.nan)
    if counted.device.type == "cpu":
        index = counted.nonzero().squeeze(-1)[:num_counted]
        return (None if index.numel() == counted.numel() else index), factor
    return counted_first(counted, num_counted), factor


def counted_first(counted: Tensor, num_counted: int | None) -> Tensor | None:
    """Numbers of the first ``num_counted`` rows with the counted ones to the front; None for all rows.

    A sort, and not a search, so that the host need not wait for how many there are.
    """
    if num_counted is None or num_counted >= counted.numel():
        return None
    return torch.argsort(~counted, stable=True)[:num_counted]
