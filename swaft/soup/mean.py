"""The mean of checkpoints, a slice at a time: summed in float64, rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.storage import Spec

SLICE = 1 << 20
"""Elements per slice: about 30 MiB in all, for any model and any number of checkpoints."""

AVERAGED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that are averaged. Tensors of other dtypes must be equal: counters, masks, and quantised weights."""

Weighted = tuple[float, SavedWeights]
"""A checkpoint and its weight."""


@dataclass
class Rounding:
    """How far rounding has moved the weights: norms of the differences relative to norms of the means."""

    by_tensor: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(sum of squared differences, sum of squares) by name."""

    def add(self, name: str, exact: Tensor, difference: Tensor) -> None:
        """Record a slice: its exact values, and how much rounding changed them; (n,) each, float64."""
        lost, whole = self.by_tensor.get(name, (0.0, 0.0))
        self.by_tensor[name] = (lost + float(difference.dot(difference)), whole + float(exact.dot(exact)))

    @property
    def overall(self) -> float:
        """Over all weights together."""
        lost, whole = (math.fsum(each[i] for each in self.by_tensor.values()) for i in (0, 1))
        return _ratio(lost, whole)

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that rounding moved most, and how far."""
        name = max(self.by_tensor, key=lambda name: _ratio(*self.by_tensor[name]), default="")
        return name, _ratio(*self.by_tensor.get(name, (0.0, 0.0)))


class Mean:
    """The weighted mean of checkpoints of one model, tensor by tensor.

    Args:
        members: pairs of weight (0 or more, not all 0) and checkpoint; the weights need not sum to 1. Checkpoints
            of weight 0 are not read.
        dtype: of the averaged tensors.
        base: provides the tensors that the members lack.
    """

    def __init__(self, members: Sequence[Weighted], dtype: torch.dtype, base: SavedWeights | None = None):
        members = [member for member in members if member[0] > 0]
        self._members, self._dtype, self._base = members, dtype, base
        self._specs = dict(members[0][1].specs)
        if base is not None:
            aliases = members[0][1].aliases
            self._specs |= {n: s for n, s in base.specs.items() if n not in self._specs and n not in aliases}
        self.rounding = Rounding()
        self._total, self._part = torch.empty(2, SLICE, dtype=torch.float64, device="cpu")

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The tensors to write."""
        return {
            name: Spec(self._dtype if spec.dtype in AVERAGED else spec.dtype, spec.shape)
            for name, spec in self._specs.items()
        }

    def slices(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor as they will be written, in order; a slice is valid until the next one.

        Raises:
            StateError: a member is not finite, the dtype cannot hold the mean, or integers differ.
        """
        spec, members = self._specs[name], self._members
        if self._base is not None and name not in members[0][1].specs:
            members = [(1.0, self._base)]
        for start in range(0, spec.numel, SLICE):
            span = (start, min(start + SLICE, spec.numel))
            if spec.dtype in AVERAGED:
                yield self.round(name, self._mean(name, members, span))
            else:
                yield _equal(name, members, span)

    def round(self, name: str, exact: Tensor) -> Tensor:
        """Values of a tensor, (n,) in float64, as they will be written; recorded in :attr:`rounding`."""
        rounded = written = round_once(exact, self._dtype)
        if not _is_finite(rounded):  # a mask may be infinite, and is left out of the norms
            finite = exact.isfinite()
            exact, rounded = exact[finite], rounded[finite]
            if not _is_finite(rounded):
                mend = "leave out" if self._dtype == torch.float32 else "use --dtype float32, or leave out"
                raise StateError(
                    f"{name!r} has {float(exact.abs().max()):.3g}, more than {self._dtype} holds; {mend} what has "
                    "diverged"
                )
        self.rounding.add(name, exact, self._part[: len(exact)].copy_(rounded).sub_(exact))
        return written

    def _mean(self, name: str, members: Sequence[Weighted], span: tuple[int, int]) -> Tensor:
        """(n,), float64: the sum of weight times value, in the members' order, over the sum of the weights."""
        total, part = (each[: span[1] - span[0]] for each in (self._total, self._part))
        for number, (weight, checkpoint) in enumerate(members):
            values = (part if number else total).copy_(checkpoint.read(name, *span))
            if weight != 1.0:
                values.mul_(weight)
            if number:
                total.add_(part)
        total.div_(math.fsum(weight for weight, _ in members))
        if not _is_finite(total):
            _refuse_infinite(name, members, span, total, copied=members is not self._members)
        return total


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to nearest, ties to even, in a single rounding.

    Torch rounds to a 16-bit dtype by way of float32. Those are two roundings, and the result is wrong if the first
    one produces a tie. So here the first one rounds to odd: an inexact value gets an odd last bit, which is no tie
    for the second.

    Args:
        values: (n,), float64.
        dtype: a floating type of 64, 32 or 16 bits.
    """
    if dtype.itemsize > 2:
        return values.to(dtype)
    near = values.float()
    error = (near.double() - values).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)  # inf is exact
    bits = near.view(torch.int32)
    bits -= (error * values.sign() > 0).int()  # towards zero
    bits |= (error != 0).int()
    return near.to(dtype)


def _is_finite(values: Tensor) -> bool:
    # Any non-finite value makes the sum non-finite, and a sum is fast.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def _refuse_infinite(
    name: str, members: Sequence[Weighted], span: tuple[int, int], total: Tensor, *, copied: bool
) -> None:
    """Refuse elements that are not finite, except those of a mask; each element is judged separately.

    An element of a mask is the same infinity in all members. A single member has no others to compare with: there,
    a mask is a slice that contains only 0 and minus infinity. One that is ``copied`` from the base, which is not
    averaged, may hold any infinity. ``total`` is the mean of the slice.
    """
    first = members[0][1].read(name, *span)
    masked = first.isinf()
    if len(members) == 1 and not copied and bool((first[first != -math.inf] != 0).any()):
        masked.zero_()
    for _, checkpoint in members[1:]:
        masked &= checkpoint.read(name, *span) == first
    for _, checkpoint in members:
        values = checkpoint.read(name, *span)
        bad = ~(values.isfinite() | masked)
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise StateError(
                f"{checkpoint.path}: element {span[0] + place} of {name!r} is {float(values[place])}; expected a "
                "number. Leave that checkpoint out"
            )
    if not bool((total.isfinite() | masked).all()):
        raise StateError(
            f"{name!r}: the sum over {len(members)} checkpoints is more than float64 holds; leave out the one that "
            "has diverged"
        )


def _equal(name: str, members: Sequence[Weighted], span: tuple[int, int]) -> Tensor:
    first = members[0][1].read(name, *span)
    for _, checkpoint in members[1:]:
        other = checkpoint.read(name, *span)
        if first.dtype != other.dtype or not torch.equal(first.view(torch.uint8), other.view(torch.uint8)):
            raise StateError(
                f"{name!r} is {first.dtype}, which cannot be averaged, and differs between {members[0][1].path} "
                f"and {checkpoint.path}; expected it to be equal. Quantised weights must be unpacked first"
            )
    return first


def _ratio(lost: float, whole: float) -> float:
    if lost == 0.0:
        return 0.0
    return math.sqrt(lost / whole) if whole else math.inf
