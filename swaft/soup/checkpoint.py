"""What every kind of checkpoint looks like from here: named tensors, read a slice at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NO_CONFIGURATION = (
    "holds weights alone; name a Hugging Face folder of the same model as --base, from which configuration, "
    "tokenizer and frozen weights come"
)
"""What is said of a checkpoint that needs a base."""


@dataclass(frozen=True)
class Spec:
    """What a tensor is like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class SavedWeights(ABC):
    """The weights of one checkpoint, of any kind. Holds no tensor; a context manager."""

    path: Path
    """The folder it was opened from."""
    specs: Mapping[str, Spec]
    """Every tensor, in the order in which reading is cheapest."""
    aliases: Mapping[str, str] = {}
    """Other names of tied tensors, which are no tensors of their own, to their names in :attr:`specs`."""
    maybe_tied: Collection[str] = ()
    """Names in :attr:`specs` that may be other names of tied tensors, where it does not say."""
    files: Path | None = None
    """Folder of configuration and tokenizer; None where it has none."""
    is_adapter: bool = False
    """Whether it is what peft keeps beside a base model."""

    @property
    def label(self) -> str:
        """What it is, for a model card."""
        return str(self.path)

    @abstractmethod
    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements [start, end) of the flattened tensor: (end - start,), of its dtype, in memory of their own.

        Raises:
            StateError: they could not be read.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of files."""

    def __enter__(self) -> SavedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Renamed(SavedWeights):
    """Saved weights by other names, or without those that are other names of tied tensors.

    Args:
        inner: the weights.
        names: of each tensor that is kept, to the one in ``inner``.
        aliases: other names of these.
    """

    def __init__(self, inner: SavedWeights, names: Mapping[str, str], aliases: Mapping[str, str]):
        self.path, self.files, self.aliases = inner.path, inner.files, aliases
        self.specs = {name: inner.specs[theirs] for name, theirs in names.items()}
        self.maybe_tied = {name for name, theirs in names.items() if theirs in inner.maybe_tied}
        self._inner, self._names = inner, names

    @property
    def label(self) -> str:  # noqa: D102 - as of SavedWeights
        return self._inner.label

    def read(self, name: str, start: int, end: int) -> Tensor:  # noqa: D102
        return self._inner.read(self._names[name], start, end)

    def close(self) -> None:  # noqa: D102
        self._inner.close()
