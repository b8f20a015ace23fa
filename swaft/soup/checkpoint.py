"""The common view of every kind of checkpoint: named tensors, read a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from swaft.storage import Spec

NO_CONFIGURATION = (
    "holds weights alone; name a Hugging Face folder of the same model as --base, from which configuration, "
    "tokenizer and frozen weights come"
)
"""Part of the message about a checkpoint that needs a base."""


@dataclass(frozen=True, kw_only=True)
class SavedWeights:
    """The weights of one checkpoint of any kind. Holds no tensor; a context manager that closes its files."""

    path: Path
    """The folder it was opened from."""
    specs: Mapping[str, Spec]
    """Every tensor, in the cheapest order for reading."""
    read: Callable[[str, int, int], Tensor]
    """Returns elements [start, end) of a flattened tensor: (end - start,), in its dtype, in new memory."""
    close: Callable[[], object] = lambda: None
    """Closes files."""
    label: str
    """What it is, for a model card."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Maps other names of tied tensors, which are not tensors of their own, to their names in ``specs``."""
    maybe_tied: Collection[str] = ()
    """Names in ``specs`` that may be other names of tied tensors, if the checkpoint does not say."""
    untrained: Collection[str] = ()
    """Names in ``specs`` of frozen weights and buffers, if the checkpoint tells them from what was trained."""
    files: Path | None = None
    """Folder of configuration and tokenizer; None if there is none."""
    is_adapter: bool = False
    """Whether it is a peft adapter."""

    def renamed(self, names: Mapping[str, str], aliases: Mapping[str, str]) -> SavedWeights:
        """Return the same weights under other names, or without some of them.

        Args:
            names: maps the new name of each kept tensor to its name here.
            aliases: other names of these tensors.
        """
        return replace(
            self,
            specs={name: self.specs[own] for name, own in names.items()},
            read=lambda name, start, end: self.read(names[name], start, end),
            aliases=aliases,
            maybe_tied={name for name, own in names.items() if own in self.maybe_tied},
            untrained={name for name, own in names.items() if own in self.untrained},
        )

    def without(self, tied: Mapping[str, str]) -> SavedWeights:
        """Return the same weights, with some names turned into aliases of tensors that are kept."""
        kept = {name: name for name in self.specs if name not in tied}
        return self.renamed(kept, {**self.aliases, **tied}) if tied else self

    def __enter__(self) -> SavedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
