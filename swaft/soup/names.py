"""Names of trained weights: those of tied tensors, and those that the base folder has for the same weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import torch

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.soup.huggingface import CONFIG, read_json
from swaft.soup.mean import SLICE
from swaft.storage import Spec

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
    kept = [name for name in checkpoint.specs if name in known]
    others = [name for name in checkpoint.specs if name not in known and name not in checkpoint.maybe_tied]
    tied = {}
    for name in others:  # equal elements identify nothing
        values = checkpoint.read(name, *_middle(checkpoint.specs[name]))
        if bool((values != values[:1]).any()) and (found := _twin([checkpoint], name, kept)):
            tied[name] = found
    return checkpoint.without(tied)


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
    tied = _tied(members, base)
    members = [member.without(tied) for member in members]
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
    names = members[0].specs
    sure = [n for n in names if n in base.specs and not any(n in member.maybe_tied for member in members)]
    lacking = [n for n in names if n not in base.specs and all(n in member.maybe_tied for member in members)]
    return {name: found for name in lacking if (found := _twin(members, name, sure))}


def _twin(members: Sequence[SavedWeights], name: str, others: Iterable[str]) -> str | None:
    """The first of some names under which every member has the same bits as under this one."""
    return next((each for each in others if all(_same_bits(member, name, each) for member in members)), None)


def _same_bits(checkpoint: SavedWeights, name: str, other: str) -> bool:
    spec = checkpoint.specs[name]
    spans = [(start, min(start + SLICE, spec.numel)) for start in range(0, spec.numel, SLICE)]
    return checkpoint.specs[other] == spec and all(
        torch.equal(*(checkpoint.read(each, *span).view(torch.uint8) for each in (name, other)))
        for span in [_middle(spec), *spans]  # a few elements tell most apart
    )


def _middle(spec: Spec) -> tuple[int, int]:
    return spec.numel // 2, min(spec.numel // 2 + 16, spec.numel)


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
    return [member.renamed(names, {_plain(n): _plain(other) for n, other in member.aliases.items()})]


def _plain(name: str) -> str:
    """The name that a weight of a `PeftModel` has in the folder of its adapter `default`."""
    return ADAPTER_PARTS.sub(lambda match: match[1] or "", name)
