"""Whether checkpoints are of one model: whatever differs is named. Pure, but for the configurations it reads."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.soup.huggingface import CONFIG, read_json
from swaft.soup.mean import AVERAGED
from swaft.storage import Spec
from swaft.storage.strict_json import shown

STRUCTURE = ("architectures", "model_type")
"""Fields of a configuration that say which model it is."""
COMPUTED = (
    *(
        "hidden_act",
        "activation_function",
        "hidden_activation",
        "feed_forward_proj",
        "position_embedding_type",
    ),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "head_dim"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
"""Fields that change what a model computes of the same weights, whatever their shapes."""
TOKENIZER = "tokenizer.json"
CLASSES = "id2label"
"""Field that says which output is which class."""
PASSING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Fields that say nothing about what the weights mean."""


def require_same_model(checkpoints: Sequence[SavedWeights]) -> list[str]:
    """Refuse checkpoints of different models.

    Args:
        checkpoints: all that are averaged.

    Returns:
        What differs between their configurations without making them different models, in words.

    Raises:
        StateError: the kind of checkpoint, the architecture, a tensor's name, shape or type differs.
    """
    first, notes = checkpoints[0], []
    for other in checkpoints[1:]:
        if first.is_adapter != other.is_adapter:
            whole, adapter = (other, first) if first.is_adapter else (first, other)
            raise StateError(
                f"{adapter.path} is an adapter and {whole.path} a whole model; they have no average"
            )
        notes += compare_configs(first.files, other.files)
        _require_same_tokens(first.files, other.files)
        if problems := list(differences(first.specs, other.specs)):
            more = f", and {len(problems) - 3} more like these" if len(problems) > 3 else ""
            raise StateError(
                f"{other.path} (the second) is another model than {first.path} (the first): "
                f"{'; '.join(problems[:3])}{more}"
            )
    return notes


def differences(first: Mapping[str, Spec], other: Mapping[str, Spec]) -> Iterator[str]:
    """What differs between the tensors of two checkpoints, a phrase each."""
    for name, spec in first.items():
        if name not in other:
            yield f"{shown(name)} is in the first alone"
        elif spec.shape != other[name].shape:
            yield f"{shown(name)} has shape {list(spec.shape)} and {list(other[name].shape)}"
        elif _kind(spec) != _kind(other[name]):
            yield f"{shown(name)} is {spec.dtype} and {other[name].dtype}"
    for name in other:
        if name not in first:
            yield f"{shown(name)} is in the second alone"


def compare_configs(first: Path | None, other: Path | None) -> list[str]:
    """What differs between the `config.json` of two folders, in words; nothing where one has none.

    Raises:
        StateError: they are of different architectures, compute another function of their weights, or have the same
            classes in another order.
    """
    if first is None or other is None or not all((path / CONFIG).exists() for path in (first, other)):
        return []
    one, two = read_json(first / CONFIG), read_json(other / CONFIG)
    both = tuple(key for key in COMPUTED if key in one and key in two)
    for key in (*STRUCTURE, *both):
        if one.get(key) != two.get(key):
            raise StateError(
                f"{other} is another model than {first}: {CONFIG}: {key} is {shown(two.get(key))}, expected "
                f"{shown(one.get(key))}"
            )
    ours, theirs = ({str(k): str(v) for k, v in (each.get(CLASSES) or {}).items()} for each in (one, two))
    if ours != theirs and sorted(ours.values()) == sorted(theirs.values()):
        raise StateError(
            f"{other} has the classes of {first} in another order: {CONFIG}: {CLASSES} is {_told(two, CLASSES)}, "
            f"expected {_told(one, CLASSES)}; an average would mix them. Train both from one head"
        )
    return [
        f"{CONFIG} of {other} differs from the first: {key} is {_told(two, key)}, there {_told(one, key)}"
        for key in sorted({*one, *two} - {*STRUCTURE, *PASSING})
        if one.get(key) != two.get(key)
    ]


def _require_same_tokens(first: Path | None, other: Path | None) -> None:
    """Refuse folders whose `tokenizer.json` gives an id to different tokens; each may have ids of its own."""
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
                "Train both with one tokenizer"
            )


def _tokens(path: Path) -> dict[int, str]:
    """Token by id, as a `tokenizer.json` lists them, an object or a list of pairs."""
    model = read_json(path).get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):
        found = {each[0]: number for number, each in enumerate(found) if isinstance(each, list) and each}
    return {number: token for token, number in found.items()} if isinstance(found, dict) else {}


def _kind(spec: Spec) -> tuple[bool, bool]:
    """Whether numbers are floating, and whether they have a mean: those of 8 bits, scaled elsewhere, have none."""
    return spec.dtype.is_floating_point, spec.dtype in AVERAGED


def _told(config: Mapping[str, Any], key: str) -> str:
    return shown(config[key]) if key in config else "not set"
