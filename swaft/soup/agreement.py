"""Whether checkpoints belong to one model, and the names of its weights: tied ones, and those of the base."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swaft.errors import StateError, first_few
from swaft.soup.checkpoint import SavedWeights
from swaft.soup.huggingface import ADAPTER_CONFIG, CONFIG, read_json
from swaft.soup.mean import AVERAGED, SLICE
from swaft.storage import Spec
from swaft.storage.strict_json import shown

STRUCTURE = ("architectures", "model_type")
"""Fields of a configuration that identify the model."""
COMPUTED = (
    *("hidden_act", "activation_function", "hidden_activation", "feed_forward_proj"),
    "position_embedding_type",
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "head_dim"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
"""Fields that change what a model computes from the same weights, without changing their shapes."""
TOKENIZER = "tokenizer.json"
CLASSES = "id2label"
"""Field that says which output is which class."""
PASSING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Fields that do not affect the meaning of the weights."""
BASE = {"base_model_name_or_path": None, "revision": "main"}
"""Settings of an adapter that identify its base weights, with the defaults they have if left out."""
NOTED = ("lora_dropout",)
"""Settings that only affect an adapter's training; differences are noted."""
PASSING_IN_ADAPTERS = ("inference_mode", "peft_version", "auto_mapping")
"""Settings that do not affect the meaning of the factors."""
OFF_IN_ADAPTERS = {
    "ensure_weight_tying": False,
    "lora_bias": False,
    "use_qalora": False,
    "use_dora": False,
    "use_rslora": False,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Values that peft writes for options that are off, and that older versions left out."""
Settings = tuple[Path, Mapping[str, Any]]
"""A folder, and the settings in one of its files."""

ADAPTER_PARTS = re.compile(
    r"\.modules_to_save\.default\b|(?<=\.lora_magnitude_vector)\.default\.weight$|\.default(?=(\.\w+)?$)"
)
"""The parts of names inside a `PeftModel` that the folder of its adapter `default` omits."""
PARAMETRIZED = ".parametrizations."
IN_THE_MODEL = (
    "Write it in a process that has the model: load it there (averages with averager.load_state), then call "
    "averager.save_pretrained"
)


def require_same_model(checkpoints: Sequence[SavedWeights]) -> list[str]:
    """Refuse checkpoints of different models.

    Args:
        checkpoints: all checkpoints to average.

    Returns:
        Differences between their configurations that do not make them different models, in words.

    Raises:
        StateError: the kind of checkpoint, the architecture, or a tensor's name, shape or dtype differs.
    """
    first, notes = checkpoints[0], []
    for other in checkpoints[1:]:
        if first.is_adapter != other.is_adapter:
            whole, adapter = (other, first) if first.is_adapter else (first, other)
            raise StateError(
                f"{adapter.path} is an adapter and {whole.path} a whole model; they cannot be averaged"
            )
        notes += compare_configs(first.files, other.files)
        if first.is_adapter:
            notes += _compare_adapters(first.path, other.path)
        _require_same_tokens(first.files, other.files)
        if problems := list(differences(first.specs, other.specs)):
            raise StateError(
                f"{other.path} (the second) is another model than {first.path} (the first): {first_few(problems)}"
            )
    return notes


def differences(first: Mapping[str, Spec], other: Mapping[str, Spec]) -> Iterator[str]:
    """The differences between the tensors of two checkpoints, one phrase each."""
    for name, spec in first.items():
        if name not in other:
            yield f"{shown(name)} is only in the first"
        elif spec.shape != other[name].shape:
            yield f"{shown(name)} has shape {list(spec.shape)} and {list(other[name].shape)}"
        elif _kind(spec) != _kind(other[name]):
            yield f"{shown(name)} is {spec.dtype} and {other[name].dtype}"
    for name in other:
        if name not in first:
            yield f"{shown(name)} is only in the second"


def compare_configs(first: Path | None, other: Path | None) -> list[str]:
    """The differences between the `config.json` of two folders, in words; empty if one has none.

    Raises:
        StateError: they have different architectures, compute different functions of their weights, or have the
            same classes in another order.
    """
    if first is None or other is None or not all((path / CONFIG).exists() for path in (first, other)):
        return []
    one, two = read_json(first / CONFIG), read_json(other / CONFIG)
    both = {key for key in COMPUTED if key in one and key in two}
    notes = _differing(CONFIG, (first, one), (other, two), PASSING, lambda key: key in {*STRUCTURE, *both})
    ours, theirs = ({str(k): str(v) for k, v in (each.get(CLASSES) or {}).items()} for each in (one, two))
    if ours != theirs and sorted(ours.values()) == sorted(theirs.values()):
        raise StateError(
            f"{other} has the classes of {first} in another order: {CONFIG}: {CLASSES} is {_told(two, CLASSES)}, "
            f"expected {_told(one, CLASSES)}; an average would mix them. Train both from the same head"
        )
    return notes


def _compare_adapters(first: Path, other: Path) -> list[str]:
    """As :func:`compare_configs`, for two adapters; one that names no base may have any."""
    one, two = _adapter_settings(first), _adapter_settings(other)
    both_name_a_base = all(each.get("base_model_name_or_path") for each in (one, two))
    for key, default in BASE.items():
        expected, found = (each.get(key) or default for each in (one, two))
        if both_name_a_base and found != expected:
            raise StateError(
                f"{other} is an adapter of another base model than {first}: {key} is {shown(found)}, expected "
                f"{shown(expected)}. If both are the same weights, make it equal in {other / ADAPTER_CONFIG}"
            )
    passing = (*PASSING_IN_ADAPTERS, *BASE)
    return _differing(ADAPTER_CONFIG, (first, one), (other, two), passing, lambda key: key not in NOTED)


def _adapter_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter, those left out included; lists are sorted, as peft writes sets in any order."""
    found = OFF_IN_ADAPTERS | read_json(folder / ADAPTER_CONFIG)
    return {
        key: sorted(value, key=repr) if isinstance(value, list) else value for key, value in found.items()
    }


def _differing(
    file: str, first: Settings, other: Settings, passing: Collection[str], refused: Callable[[str], bool]
) -> list[str]:
    """The differences between two settings files, in words; a difference in a refused setting is an error."""
    (here, one), (there, two) = first, other
    differing, notes = {key for key in (*one, *two) if one.get(key) != two.get(key)}, []
    for key in sorted(differing.difference(passing)):
        if refused(key):
            raise StateError(
                f"{there} is another {'model' if file == CONFIG else 'adapter'} than {here}: {file}: {key} is "
                f"{shown(two.get(key))}, expected {shown(one.get(key))}"
            )
        found, expected = _told(two, key), _told(one, key)
        notes.append(f"{file} of {there} differs from the first: {key} is {found}, there {expected}")
    return notes


def _require_same_tokens(first: Path | None, other: Path | None) -> None:
    """Refuse folders whose `tokenizer.json` maps an id to different tokens; each may have extra ids."""
    if first is None or other is None or not all((path / TOKENIZER).exists() for path in (first, other)):
        return
    if filecmp.cmp(first / TOKENIZER, other / TOKENIZER, shallow=False):
        return
    ours, theirs = _tokens(first / TOKENIZER), _tokens(other / TOKENIZER)
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise StateError(
                f"{other} numbers the tokens of {first} in another way: {TOKENIZER}: {number} is "
                f"{shown(theirs[number])}, expected {shown(ours[number])}; an average would mix their embeddings. "
                "Train both with the same tokenizer"
            )


def _tokens(path: Path) -> dict[int, str]:
    """Tokens by id, from a `tokenizer.json` that lists them as an object or as a list of pairs."""
    whole = read_json(path)
    model, added = whole.get("model"), whole.get("added_tokens")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):
        found = {each[0]: number for number, each in enumerate(found) if isinstance(each, list) and each}
    tokens = {number: token for token, number in found.items()} if isinstance(found, dict) else {}
    for each in added if isinstance(added, list) else []:
        if isinstance(each, dict) and {"id", "content"} <= each.keys():
            tokens[each["id"]] = each["content"]
    return tokens


def _kind(spec: Spec) -> tuple[bool, bool]:
    """Whether numbers are floating-point, and whether they can be averaged: 8-bit ones, scaled apart, cannot."""
    return spec.dtype.is_floating_point, spec.dtype in AVERAGED


def _told(config: Mapping[str, Any], key: str) -> str:
    return shown(config[key]) if key in config else "not set"


def without_tied(
    members: Sequence[SavedWeights], base: SavedWeights | None
) -> tuple[list[SavedWeights], SavedWeights | None]:
    """Checkpoints of one model, with tied tensors removed under names that other checkpoints leave out.

    If some checkpoints lack a name, and its tensor has the same bits as one that all have, the name is taken for an
    alias of that tensor. This does not happen if the `config.json` of a member that lacks it, or that of the base,
    says that nothing is tied.

    Args:
        members: the checkpoints to average.
        base: provides what they lack, or None.
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
    """A checkpoint without the tensors that it also has under a known name."""
    kept = [name for name in checkpoint.specs if name in known]
    others = [name for name in checkpoint.specs if name not in known and name not in checkpoint.maybe_tied]
    tied = {}
    for name in others:  # constant tensors identify nothing
        values = checkpoint.read(name, *_middle(checkpoint.specs[name]))
        if bool((values != values[:1]).any()) and (found := _twin([checkpoint], name, kept)):
            tied[name] = found
    return checkpoint.without(tied)


def fit_to_base(members: list[SavedWeights], base: SavedWeights) -> list[SavedWeights]:
    """Check checkpoints against the base that provides what they lack.

    Args:
        members: checkpoints of one model.
        base: Hugging Face folder of that model, or its adapter folder.

    Returns:
        The same checkpoints, with the names of the base.

    Raises:
        StateError: the base belongs to another model, does not have these weights under any name, or stores them
            in a form that only the model can compute.
    """
    first = members[0]
    if first.is_adapter and not base.is_adapter:
        raise StateError(
            f"{first.path} is an adapter, and --base {base.path} a whole model; an adapter folder lacks nothing: "
            "leave --base out"
        )
    for name in first.specs:
        if PARAMETRIZED in f".{name}" and name not in base.specs:
            raise StateError(
                f"{first.path}: {name!r} is a weight before its parametrization (R4F's spectral norm, say), and "
                f"only the model can compute the weight after it. {IN_THE_MODEL}"
            )
    adapted = (name for name in first.specs if name not in base.specs and ADAPTER_PARTS.search(name))
    if not first.is_adapter and any(adapted):
        members = _as_adapters(members, base)
    tied = _tied(members, base)
    members = [member.without(tied) for member in members]
    for name, spec in members[0].specs.items():
        found = base.specs.get(name)
        if found is None or found.shape != spec.shape:
            what = f"of shape {list(found.shape)} there" if found else "missing there"
            what = f"{name!r} of shape {list(spec.shape)} is {what}"
            if form := _other_form(base):
                raise StateError(
                    f"{first.path} does not fit --base {base.path}: {what}; {form}, and only the model can turn "
                    f"one into the other. {IN_THE_MODEL}"
                )
            raise StateError(f"--base {base.path} is another model than {first.path}: {what}")
    return members


def _other_form(base: SavedWeights) -> str | None:
    """In what way a folder of this kind differs from the model in memory, in words; None if it does not."""
    if base.is_adapter:
        method = read_json(base.path / ADAPTER_CONFIG).get("peft_type")
        if method in (None, "LORA"):
            return None
        return f"peft stores {shown(method)} in another form than it has in memory"
    if base.files is None or not (base.files / CONFIG).exists():
        return None
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # then nothing says which models are converted
        return None
    kinds = _model_types(read_json(base.files / CONFIG))
    kind = next((each for each in kinds if get_checkpoint_conversion_mapping(each)), None)
    return kind and f"transformers stores the weights of {kind} under other names than they have in memory"


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """What transformers looks a conversion up by: classes and model types, also of nested configurations."""
    for name in (*(config.get("architectures") or ()), config.get("model_type")):
        if isinstance(name, str):
            yield name
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)


def _tied(members: Sequence[SavedWeights], base: SavedWeights) -> dict[str, str]:
    """Names that the base has under another name: a folder stores tied tensors only once.

    Two names are taken for tied if every member has the same bits under both.
    """
    names = members[0].specs
    sure = [n for n in names if n in base.specs and not any(n in member.maybe_tied for member in members)]
    lacking = [n for n in names if n not in base.specs and all(n in member.maybe_tied for member in members)]
    return {name: found for name in lacking if (found := _twin(members, name, sure))}


def _twin(members: Sequence[SavedWeights], name: str, others: Iterable[str]) -> str | None:
    """The first of ``others`` under which every member has the same bits as under ``name``."""
    return next((each for each in others if all(_same_bits(member, name, each) for member in members)), None)


def _same_bits(checkpoint: SavedWeights, name: str, other: str) -> bool:
    spec = checkpoint.specs[name]
    spans = [(start, min(start + SLICE, spec.numel)) for start in range(0, spec.numel, SLICE)]
    return checkpoint.specs[other] == spec and all(
        torch.equal(*(checkpoint.read(each, *span).view(torch.uint8) for each in (name, other)))
        for span in [_middle(spec), *spans]  # a few elements distinguish most
    )


def _middle(spec: Spec) -> tuple[int, int]:
    return spec.numel // 2, min(spec.numel // 2 + 16, spec.numel)


def _as_adapters(members: list[SavedWeights], base: SavedWeights) -> list[SavedWeights]:
    if not base.is_adapter:
        raise StateError(
            f"{members[0].path} holds the weights of an adapter, and --base {base.path} is a whole model; name "
            "the adapter folder of the run as --base (its best, final or final-averaged), and an adapter folder "
            "will be written"
        )
    adapters = []
    for member in members:
        # DeepSpeed also saves what is frozen, and an adapter folder omits most of it. What is trained is in both.
        kept = [name for name in member.specs if name not in member.untrained or _plain(name) in base.specs]
        names = {_plain(name): name for name in kept}
        if len(names) < len(kept):
            raise StateError(
                f"{member.path}: two of its weights have the same name in an adapter folder. {IN_THE_MODEL}"
            )
        aliases = {_plain(name): _plain(other) for name, other in member.aliases.items()}
        lacking = next((name for name in base.specs if name not in names and name not in aliases), None)
        if len(kept) < len(member.specs) and lacking:
            raise StateError(
                f"--base {base.path} holds {lacking!r}, which {member.path} lacks, though it holds frozen weights; "
                "name the adapter folder of the same run as --base"
            )
        adapters.append(replace(member.renamed(names, aliases), is_adapter=True, files=base.files))
    return adapters


def _plain(name: str) -> str:
    """The name that a weight of a `PeftModel` has in the folder of its adapter `default`."""
    return ADAPTER_PARTS.sub("", name)
