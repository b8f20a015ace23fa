"""DeepSpeed's checkpoints of ZeRO 1 to 3, read in slices: DeepSpeed's own reader loads the whole model into memory.

This reads the fp32 masters, from the files and fields that DeepSpeed's `zero_to_fp32` uses. Every tensor is a list
of views into files that torch maps, so only a slice is ever copied.

The files are Python pickle, and opening them runs whatever code they contain. So they are opened only on request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swaft.errors import StateError
from swaft.soup.checkpoint import SavedWeights
from swaft.soup.huggingface import CONFIG
from swaft.storage import Spec
from swaft.storage.files import read_whole

OPTIMIZER_FILES = "*_optim_states.pt"


def open_zero(path: Path, tag: Path) -> SavedWeights:
    """Open a folder that `save_checkpoint` wrote. This unpickles its files.

    Args:
        path: the folder.
        tag: the folder of DeepSpeed's files in it, by :func:`find_tag`.

    Raises:
        StateError: its files are not the complete files of all ranks of ZeRO stage 1, 2 or 3.
    """
    try:
        from deepspeed.utils import zero_to_fp32
    except ImportError as error:
        raise StateError(f"{path} is a DeepSpeed checkpoint; reading it needs swaft[deepspeed]") from error
    try:
        states = [_load(file) for file in zero_to_fp32.get_model_state_files(str(tag))]
        files = zero_to_fp32.get_optim_files(str(tag))
        partitions = [_load(file)["optimizer_state_dict"] for file in files]
        # Masters are pickled as leaves that require gradients; copies of them would, too.
        pieces = {
            name: (spec, [piece.detach() for piece in parts])
            for name, (spec, parts) in _tensors(partitions, states)
        }
        aliases = dict(states[0]["shared_params"])
        trained = {name for shapes in states[0]["param_shapes"] for name in shapes}
    except Exception as error:  # unpickling can raise anything
        raise StateError(f"{tag} could not be read: {type(error).__name__}: {error}") from error

    def read(name: str, start: int, end: int) -> Tensor:
        spec, parts = pieces[name]
        return torch.cat([torch.empty(0, dtype=spec.dtype), *_window(parts, start, end - start)])

    return SavedWeights(
        path=path,
        specs={name: spec for name, (spec, _) in pieces.items() if name not in aliases},
        read=read,
        label=str(path),
        aliases=aliases,
        untrained=pieces.keys() - trained,
        files=path if (path / CONFIG).exists() else None,
    )


def find_tag(path: Path) -> Path | None:
    """The folder of DeepSpeed's files in a checkpoint folder; None if there is none."""
    if any(path.glob(OPTIMIZER_FILES)):
        return path
    if not (path / "latest").is_file():
        return None
    tag = read_whole(path / "latest", limit=4096).decode(errors="replace").strip()
    found = path / tag
    return found if Path(tag).name == tag and any(found.glob(OPTIMIZER_FILES)) else None


def _load(file: str) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _tensors(
    partitions: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, tuple[Spec, list[Tensor]]]]:
    """Name, spec, and flat views that hold the elements of a tensor, one after the other."""
    first, world_size = partitions[0], len(partitions)
    stage = first.get("zero_stage", 1)  # missing in the bf16 optimizer with fp32 gradients
    counts = first["partition_count"]
    if world_size != (max(counts) if isinstance(counts, list) else counts):
        raise ValueError(f"files of {world_size} ranks are there; expected those of {counts}")
    if len(states) != (world_size if stage == 3 else 1):
        raise ValueError(f"{len(states)} files of model states: of pipeline, tensor or expert parallelism")
    flat = [
        each["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for each in partitions
    ]
    if stage == 3:
        trainable = _partitioned(flat, states)
    else:
        trainable = _replicated(flat, first.get("param_alignment_paddings"), states)
    yield from _untrained(stage, states)
    for name, shape, pieces in trainable:
        if sum(piece.numel() for piece in pieces) != math.prod(shape):
            raise ValueError(f"the partitions are too short for {name!r} of shape {tuple(shape)}")
        yield name, (Spec(torch.float32, tuple(shape)), pieces)


def _untrained(
    stage: int, states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, tuple[Spec, list[Tensor]]]]:
    """Buffers and frozen weights, which only some stages list separately."""
    module, frozen = states[0]["module"], states[0].get("frozen_param_shapes") or {}
    trained = {name for shapes in states[0]["param_shapes"] for name in shapes}
    whole = {*module} - {*trained, *frozen} if stage <= 2 else {*states[0]["buffer_names"]}
    for name in module:
        if name in whole:
            yield name, (Spec(module[name].dtype, tuple(module[name].shape)), [module[name].reshape(-1)])
    for name, shape in frozen.items():
        fragments = [state["frozen_param_fragments"][name].reshape(-1) for state in states]
        yield name, (Spec(fragments[0].dtype, tuple(shape)), list(_window(fragments, 0, math.prod(shape))))


def _replicated(
    flat: Sequence[Sequence[Tensor]], paddings: Any, states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Sequence[int], list[Tensor]]]:
    """Stages 1 and 2: one long vector per parameter group, of which each rank holds a part."""
    for group, shapes in enumerate(states[0]["param_shapes"]):
        parts, offset = [partitions[group] for partitions in flat], 0
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, shape, list(_window(parts, offset, math.prod(shape)))
            offset += math.prod(shape) + (paddings[group][number] if paddings is not None else 0)
        _require_used(offset, sum(part.numel() for part in parts), 2 * len(flat))


def _partitioned(
    flat: Sequence[Sequence[Tensor]], states: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Sequence[int], list[Tensor]]]:
    """Stage 3: every parameter in as many equal parts as there are ranks, at the same offset on each rank."""
    offset = 0
    for shapes in states[0]["param_shapes"]:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = math.ceil(numel / len(flat))
            pieces = [view for groups in flat for view in _window(groups, offset, part)]
            yield name, shape, list(_window(pieces, 0, numel))
            offset += part
    _require_used(offset, sum(group.numel() for group in flat[0]), 1)


def _require_used(used: int, there: int, alignment: int) -> None:
    if math.ceil(used / alignment) != math.ceil(there / alignment):
        raise ValueError(f"the parameters take {used:,} elements of partitions that have {there:,}")


def _window(parts: Sequence[Tensor], start: int, length: int) -> Iterator[Tensor]:
    """Views of elements [start, start + length) of flat tensors laid end to end."""
    for part in parts:
        if length and start < part.numel():
            taken = min(length, part.numel() - start)
            yield part.narrow(0, start, taken)
            length -= taken
        start = max(start - part.numel(), 0)
