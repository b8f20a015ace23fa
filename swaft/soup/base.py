"""Trained weights that lie alone, and the base folder that gives what they lack: held to each other by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import Checkpoint
from swaft.soup.huggingface import CONFIG, read_json
from swaft.soup.mean import SLICE

ADAPTER_PARTS = re.compile(
    r"\.modules_to_save\.default\b|(?<=\.)(lora_\w+|trainable_tokens_delta)\.default(?=\.|$)"
)
"""Where a name inside a `PeftModel` says which adapter is meant; in the adapter's folder it does not."""
PARAMETRIZED = ".parametrizations."
IN_THE_MODEL = (
    "Write it in a process that has the model: load it there (averages with averager.load_state), then call "
    "averager.save_pretrained"
)


class AsAdapter(Checkpoint):
    """Weights of a `PeftModel`, under the names that they have in the folder of its adapter.

    The names are those of peft for the adapter `default`.

    Args:
        inner: the weights, by their names in the model.
    """

    def __init__(self, inner: Checkpoint):
        self.path, self.files, self._inner = inner.path, inner.files, inner
        self._names = {_plain(name): name for name in inner.specs}
        self.specs = {plain: inner.specs[name] for plain, name in self._names.items()}
        self.aliases = {_plain(name): _plain(other) for name, other in inner.aliases.items()}
        if len(self._names) < len(inner.specs):
            raise StateError(
                f"{inner.path}: two of its weights have one name in an adapter folder. {IN_THE_MODEL}"
            )

    @property
    def told(self) -> str:
        """As of :class:`Checkpoint`."""
        return self._inner.told

    def read(self, name: str, start: int, end: int) -> Tensor:
        """As of :class:`Checkpoint`."""
        return self._inner.read(self._names[name], start, end)

    def close(self) -> None:
        """As of :class:`Checkpoint`."""
        self._inner.close()


class WithoutTied(Checkpoint):
    """A checkpoint, but that other names of tied tensors are known as such.

    Args:
        inner: has the tensors under each of their names.
        tied: name to the one that is kept.
    """

    def __init__(self, inner: Checkpoint, tied: Mapping[str, str]):
        self.path, self.files, self._inner = inner.path, inner.files, inner
        self.maybe_tied = inner.maybe_tied
        self.specs = {name: spec for name, spec in inner.specs.items() if name not in tied}
        self.aliases = {**inner.aliases, **tied}

    @property
    def told(self) -> str:
        """As of :class:`Checkpoint`."""
        return self._inner.told

    def read(self, name: str, start: int, end: int) -> Tensor:
        """As of :class:`Checkpoint`."""
        return self._inner.read(name, start, end)

    def close(self) -> None:
        """As of :class:`Checkpoint`."""
        self._inner.close()


def without_tied(
    members: Sequence[Checkpoint], base: Checkpoint | None
) -> tuple[list[Checkpoint], Checkpoint | None]:
    """Checkpoints of one model, but that none stores a tied tensor under a name that others leave out.

    A name that some lack is believed to be another one of a tensor that all have where both have the same bits,
    unless the `config.json` of a member that lacks it, or the base's own, says that nothing is tied.

    Args:
        members: that are averaged.
        base: of which what they lack is taken, or None.
    """
    if members[0].is_adapter:
        return list(members), base
    names = set[str]().union(*(member.specs for member in members))
    everywhere = names.intersection(*(member.specs for member in members))
    if base is not None and not _unties(base):
        base = _without_tied(base, everywhere)
    if any(_unties(member) for member in members if len(member.specs) < len(names)):
        return list(members), base
    return [_without_tied(member, everywhere) for member in members], base


def _unties(checkpoint: Checkpoint) -> bool:
    """Whether a configuration says that the model ties nothing."""
    config = None if checkpoint.files is None else checkpoint.files / CONFIG
    return config is not None and config.exists() and read_json(config).get("tie_word_embeddings") is False


def _without_tied(checkpoint: Checkpoint, known: Collection[str]) -> Checkpoint:
    """A checkpoint without those tensors that it has under a known name, too."""
    others = [name for name in checkpoint.specs if name not in known and name not in checkpoint.maybe_tied]
    if not others:
        return checkpoint
    middles = {_middle(checkpoint, name): name for name in checkpoint.specs if name in known}
    tied = {}
    for name in others:
        found = middles.get(_middle(checkpoint, name))
        if found is not None and _same_bits(checkpoint, name, found):
            tied[name] = found
    return WithoutTied(checkpoint, tied) if tied else checkpoint


def _middle(checkpoint: Checkpoint, name: str) -> object:
    """A few elements that identify a tensor; where they are all equal, its name alone does."""
    spec = checkpoint.specs[name]
    start = spec.numel // 2
    values = checkpoint.read(name, start, min(start + 16, spec.numel))
    return (spec, bytes(values.view(torch.uint8).numpy())) if bool((values != values[:1]).any()) else (name,)


def fit_to_base(members: list[Checkpoint], base: Checkpoint) -> list[Checkpoint]:
    """Hold checkpoints to the base that gives what they lack.

    Args:
        members: of one model.
        base: Hugging Face folder of that model, or the folder of its adapter.

    Returns:
        The same, by the names of the base.

    Raises:
        StateError: the base is of another model, or does not know these weights under any name.
    """
    first = members[0]
    for name in first.specs:
        if PARAMETRIZED in f".{name}":
            raise StateError(
                f"{first.path}: {name!r} is a weight before its parametrization (R4F's spectral norm, say), and "
                f"what that makes of it only the model knows. {IN_THE_MODEL}"
            )
    if not first.is_adapter and any(ADAPTER_PARTS.search(name) for name in first.specs):
        members = _as_adapters(members, base)
    if tied := _tied(members, base):
        members = [WithoutTied(member, tied) for member in members]
    for name, spec in members[0].specs.items():
        found = base.specs.get(name)
        if found is None or found.shape != spec.shape:
            told = f"of shape {list(found.shape)} there" if found else "missing there"
            raise StateError(
                f"--base {base.path} is another model than {first.path}: {name!r} of shape {list(spec.shape)} "
                f"is {told}"
            )
    return members


def _tied(members: Sequence[Checkpoint], base: Checkpoint) -> dict[str, str]:
    """Names that the base lacks, of what it has under another name: a folder has tied tensors once.

    It is believed of what has the same bits under both names in every member.
    """
    first, found = members[0], dict[str, str]()
    for name in first.specs:
        if name not in base.specs and all(name in member.maybe_tied for member in members):
            for other, spec in first.specs.items():
                if (
                    other in base.specs
                    and not any(other in member.maybe_tied for member in members)
                    and spec == first.specs[name]
                    and all(_same_bits(member, name, other) for member in members)
                ):
                    found[name] = other
                    break
    return found


def _same_bits(checkpoint: Checkpoint, name: str, other: str) -> bool:
    spec = checkpoint.specs[name]
    spans = [(start, min(start + SLICE, spec.numel)) for start in range(0, spec.numel, SLICE)]
    return checkpoint.specs[other] == spec and all(
        torch.equal(*(checkpoint.read(each, *span).view(torch.uint8) for each in (name, other)))
        for span in spans
    )


def _as_adapters(members: list[Checkpoint], base: Checkpoint) -> list[Checkpoint]:
    if not base.is_adapter:
        raise StateError(
            f"{members[0].path} holds the weights of a LoRA adapter, and --base {base.path} is a whole model; name "
            "the adapter folder of the run as --base (its best, final or final-averaged), and an adapter folder "
            "will be written"
        )
    if len(members) > 1:
        raise StateError(
            f"{members[0].path} holds the weights of a LoRA adapter; the mean of factors is not the mean of "
            "updates. Write each as an adapter folder with swaft export, then average those folders"
        )
    return [AsAdapter(member) for member in members]


def _plain(name: str) -> str:
    return ADAPTER_PARTS.sub(lambda match: match[1] or "", name)
