"""Flat views of tensors that somebody else may give other storage at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from swaft.errors import LayoutError


class FlatViews:
    """Flat views of tensors, made anew where one of them has other storage than before.

    `module.to`, `weight.data = weight.data.clamp(-1, 1)`, a loaded checkpoint and FSDP2's first forward replace
    storage, and views of the old one would be averaged from then on. The views keep the old storage alive until
    they are asked for again, so that no new one can be mistaken for it by its address.

    Args:
        tensors: gives the tensors as they are now; called every time, so without a loop in Python.
        numels: elements of the views that each tensor is cut into; by default one view a tensor.
    """

    def __init__(
        self, tensors: Callable[[], Sequence[Tensor]], *, numels: Sequence[Sequence[int]] | None = None
    ):
        self._tensors = tensors
        self._numels = numels
        self._addresses: list[object] | None = None
        self._views: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        """Flat tensors without gradient; the same list object while no storage has moved.

        Raises:
            LayoutError: a tensor is not contiguous.
        """
        tensors = self._tensors()
        addresses = [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]
        if addresses != self._addresses:
            self._views = [_flat(tensor) for tensor in tensors]
            if self._numels is not None:
                cut = zip(self._views, self._numels, strict=True)
                self._views = [view for flat, numels in cut for view in flat.split(list(numels))]
            self._addresses = addresses
        return self._views


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise LayoutError(
            f"a trainable tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}, expected a "
            "contiguous one; call `.contiguous()` on it before the optimizer is built"
        )
    return tensor.detach().view(-1)
