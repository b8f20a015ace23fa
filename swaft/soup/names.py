"""Names of trained weights: those of tied tensors, and those that the base folder has for the same weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch

from swaft.errors import StateError
from swaft.soup.checkpoint import Renamed, SavedWeights
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


def without_tied(
    members: Sequence[SavedWeights], base: SavedWeights | None
) -> tuple[list[SavedWeights], SavedWeights | None]:
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


def _unties(checkpoint: SavedWeights) -> bool:
    """Whether a configuration says that the model ties nothing."""
    config = None if checkpoint.files is None else checkpoint.files / CONFIG
    return config is not None and config.exists() and read_json(config).get("tie_word_embeddings") is False


def _without_tied(checkpoint: SavedWeights, known: Collection[str]) -> SavedWeights:
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
    return _leave_out(checkpoint, tied) if tied else checkpoint


def _leave_out(checkpoint: SavedWeights, tied: Mapping[str, str]) -> SavedWeights:
    """A checkpoint in which some names are other ones of tensors that are kept."""
    kept = {name: name for name in checkpoint.specs if name not in tied}
    return Renamed(checkpoint, kept, {**checkpoint.aliases, **tied})


def _middle(checkpoint: SavedWeights, name: str) -> object:
    """A few elements that identify a tensor; where they are all equal, its name alone does."""
    spec = checkpoint.specs[name]
    start = spec.numel // 2
    values = checkpoint.read(name, start, min(start + 16, spec.numel))
    return (spec, bytes(values.view(torch.uint8).numpy())) if bool((values != values[:1]).any()) else (name,)


def fit_to_base(members: list[SavedWeights], base: SavedWeights) -> list[SavedWeights]:
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
        members = [_leave_out(member, tied) for member in members]
    for name, spec in members[0].specs.items():
        found = base.specs.get(name)
        if found is None or found.shape != spec.shape:
            what = f"of shape {list(found.shape)} there" if found else "missing there"
            raise StateError(
                f"--base {base.path} is another model than {first.path}: {name!r} of shape {list(spec.shape)} "
                f"is {what}"
            )
    return members


def _tied(members: Sequence[SavedWeights], base: SavedWeights) -> dict[str, str]:
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


def _same_bits(checkpoint: SavedWeights, name: str, other: str) -> bool:
    spec = checkpoint.specs[name]
    spans = [(start, min(start + SLICE, spec.numel)) for start in range(0, spec.numel, SLICE)]
    return checkpoint.specs[other] == spec and all(
        torch.equal(*(checkpoint.read(each, *span).view(torch.uint8) for each in (name, other)))
        for span in spans
    )


def _as_adapters(members: list[SavedWeights], base: SavedWeights) -> list[SavedWeights]:
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
    (member,) = members
    names = {_plain(name): name for name in member.specs}
    if len(names) < len(member.specs):
        raise StateError(
            f"{member.path}: two of its weights have one name in an adapter folder. {IN_THE_MODEL}"
        )
    return [Renamed(member, names, {_plain(n): _plain(other) for n, other in member.aliases.items()})]


def _plain(name: str) -> str:
    """The name that a weight of a `PeftModel` has in the folder of its adapter `default`."""
    return ADAPTER_PARTS.sub(lambda match: match[1] or "", name)
