"""Which kind of checkpoint a folder is, and which checkpoints a run has left."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from swaft.averaging.arithmetic import combine
from swaft.averaging.state import KIND as AVERAGE
from swaft.averaging.state import AverageState, RankFiles, lane_name
from swaft.errors import StateError
from swaft.soup.checkpoint import NO_CONFIGURATION, SavedWeights
from swaft.soup.huggingface import ADAPTER_CONFIG, CONFIG, holds_weights, open_folder
from swaft.soup.torch_engine import METADATA, open_torch_engine
from swaft.soup.zero import find_tag, open_zero
from swaft.storage import Manifest, Spec, is_complete, read_manifest, verify
from swaft.storage.files import explained, status
from swaft.storage.sealed import MANIFEST

RUN = "run"
"""The kind in the manifest of a swaft run's checkpoint."""
ENGINE = "engine"
"""Folder of DeepSpeed's or torch's files inside such a checkpoint."""
ENGINE_FILES = ("*.pt", "*.distcp", METADATA)
"""The files in it that are opened."""
AVERAGES = "average"
"""Folder of the averages inside such a checkpoint."""
RANK_FILES = "rank-*.safetensors"
"""Files inside such a checkpoint, one per rank."""
NUMBERED = re.compile(r"(.*?)([0-9]{1,18})")


def open_checkpoint(
    path: Path, *, trust_pickle: bool = False, rule: str | None = None, has_base: bool = True
) -> SavedWeights:
    """Open a checkpoint of any known kind.

    Args:
        path: its folder.
        trust_pickle: whether Python pickle files may be opened.
        rule: which average to take from a saved state of averages.
        has_base: whether configuration and tokenizer come from elsewhere. If not, one message reports both a
            missing configuration and files that may not be opened.

    Raises:
        StateError: it is not a known kind of checkpoint, or is damaged.
    """
    with explained(path, "looked at"):
        is_folder = path.is_dir()
    if not is_folder:
        raise StateError(f"{path} is not a folder; expected the folder of a checkpoint")
    copied = is_copy_of_masters(path)
    if holds_weights(path) and not copied:
        return open_folder(path)
    manifest = read_manifest(path, kind=None) if is_complete(path) else None
    if manifest is not None and manifest.kind == AVERAGE:
        _hold_to_run(path)
        return open_average(path, manifest, rule=rule)
    is_run = manifest is not None and manifest.kind == RUN
    engines = [path / ENGINE, path] if is_run else [path]
    for engine in engines:
        tag = find_tag(engine)
        if tag is None and (engine == path or not (engine / METADATA).exists()):
            continue
        # Checked before all of it is read for verification.
        what = "a DeepSpeed checkpoint" if tag else "a distributed checkpoint of torch"
        if copied:
            what += (
                ", whose safetensors are only a 16-bit copy of the fp32 weights in DeepSpeed's files (to average "
                "the copy all the same, move it to a folder without them)"
            )
        _require_options(engine, what, trust_pickle, has_base)
        if manifest is not None and engine != path:
            _verify_engine(path, manifest)
        return open_zero(engine, tag) if tag else open_torch_engine(engine)
    if (path / METADATA).exists():
        raise StateError(
            f"{path} is a distributed checkpoint of torch without the manifest of a swaft run; expected one that "
            "such a run wrote: name the folder that contains its folder engine. For others, write a Hugging Face "
            "folder first, with save_pretrained"
        )
    raise StateError(
        f"{path} is not a checkpoint that can be averaged; expected a folder with model.safetensors or its index, "
        "with adapter_model.safetensors, a checkpoint of a swaft run, a DeepSpeed checkpoint of ZeRO 1 to 3, or a "
        "saved state of averages. For others (pytorch_model.bin, torch's distributed checkpoints), write a Hugging "
        "Face folder first, with save_pretrained"
    )


def is_copy_of_masters(path: Path) -> bool:
    """Whether a folder's safetensors are 16-bit and DeepSpeed's fp32 masters are in it, too.

    transformers' Trainer writes both. The copy has lost much of what a few steps change, so it is never averaged.
    """
    if not holds_weights(path) or find_tag(path) is None:
        return False
    with open_folder(path) as copy:
        return any(spec.dtype in (torch.bfloat16, torch.float16) for spec in copy.specs.values())


def is_average(path: Path) -> bool:
    """Whether a folder is a saved state of averages."""
    return is_complete(path) and read_manifest(path, kind=None).kind == AVERAGE


def open_average(path: Path, manifest: Manifest, *, rule: str | None) -> SavedWeights:
    """Open a saved state of averages, which contains only the trained parameters.

    Args:
        path: the sealed folder.
        manifest: its manifest.
        rule: which rule; None: the only one.

    Raises:
        StateError: the folder is damaged, or nothing has been averaged in it yet.
    """
    verify(path, manifest)
    state = AverageState.from_json(manifest.content, where=path)
    names = [each.name for each in state.rules]
    if (rule is None and len(names) > 1) or (rule is not None and rule not in names):
        unknown = "" if rule is None else f" and none called {rule}"
        raise StateError(f"{path} holds the averages {', '.join(names)}{unknown}; choose one with --rule")
    number = 0 if rule is None else names.index(rule)
    chosen = state.rules[number]
    if not chosen.readout:
        raise StateError(
            f"{path}: nothing is averaged yet by {chosen.rule}, after {state.applied_steps} steps"
        )
    lanes = [(lane_name(number, lane), share, chosen.lanes[lane]) for lane, share in chosen.readout.items()]
    files = RankFiles(path, sorted(manifest.files))

    def read(name: str, start: int, end: int) -> Tensor:
        def vector(lane: str, dtype: torch.dtype) -> Tensor:
            values = torch.empty(end - start, dtype=dtype, device="cpu")
            files.read([(name, start, end)], {lane: values})
            return values

        if [share for _, share, _ in lanes] == [1.0]:
            return vector(f"{lanes[0][0]}.mean", torch.float32)
        return combine(
            (
                share,
                vector(f"{lane}.mean", torch.float32),
                vector(f"{lane}.compensation", torch.bfloat16) if compensated else None,
            )
            for lane, share, compensated in lanes
        )

    return SavedWeights(
        path=path,
        specs={name: Spec(torch.float32, tuple(shape)) for name, shape in state.parameters.items()},
        read=read,
        close=files.close,
        label=f"{path}: {chosen.name}, {chosen.rule}, {chosen.count} weights taken in",
        aliases=state.aliases,
    )


def _require_options(path: Path, what: str, trust_pickle: bool, has_base: bool) -> None:
    """Report everything that is missing to open a pickle checkpoint, before any of it is opened."""
    lacking = []
    if not trust_pickle:
        lacking.append(
            "its files are Python pickle, and opening one runs whatever code it holds. If you know who wrote it, "
            "pass --trust-pickle"
        )
    if not has_base and not any((path / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        lacking.append(f"it {NO_CONFIGURATION}")
    if lacking:
        raise StateError(f"{path} is {what}: {'. And '.join(lacking)}")


def _hold_to_run(path: Path) -> None:
    """Check averages inside a run's checkpoint against the manifest of that checkpoint, as resuming does.

    Each of the two folders is complete on its own, even if one of them comes from another step. Averages outside of
    a run's checkpoint have nothing to be checked against.
    """
    whole = path.absolute()
    if whole.name != AVERAGES:
        return
    with explained(whole.parent, "looked into"):  # for whatever remains of a run's checkpoint
        files = (status(whole.parent / MANIFEST), *whole.parent.glob(RANK_FILES))
        if not is_complete(whole.parent) and not any(files):
            return
    manifest = read_manifest(whole.parent, kind=None)  # this also checks every sealed folder inside
    if manifest.kind == RUN and AVERAGES not in manifest.sealed:
        raise StateError(
            f"{whole} is not among what {whole.parent} was written with; it belongs to another run"
        )


def _verify_engine(path: Path, manifest: Manifest) -> None:
    """Check the engine's files in a run's checkpoint against its manifest; unlisted files are not opened."""
    listed = [name for name in manifest.files if name.startswith(f"{ENGINE}/")]
    for file in sorted(file for pattern in ENGINE_FILES for file in (path / ENGINE).glob(pattern)):
        if f"{ENGINE}/{file.name}" not in listed:
            raise StateError(f"{file} is not among the files that {path} was written with; remove it")
    verify(path, manifest, names=listed)


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The last checkpoints of a run, the oldest first, by the step in their names.

    Args:
        run: folder that contains folders named like `checkpoint-500`.
        count: how many.

    Raises:
        StateError: there are fewer, or their names do not match.
    """
    with explained(run, "listed"):
        found = [
            (match[1], int(match[2]), path)
            for path in sorted(run.iterdir())
            if path.is_dir() and (match := NUMBERED.fullmatch(path.name))
        ]
    if any(is_complete(path) for _, _, path in found):  # then one without a mark is unfinished
        found = [each for each in found if is_complete(each[2])]
    names = ", ".join(path.name for _, _, path in found) or "none"
    if len({prefix for prefix, _, _ in found}) > 1 or len({step for _, step, _ in found}) < len(found):
        raise StateError(
            f"{run}: which checkpoints follow each other is not clear ({names}); name them one by one"
        )
    if len(found) < count:
        raise StateError(
            f"{run} holds {len(found)} numbered checkpoints ({names}); --last asks for {count}. A swaft run keeps "
            "as many as train.save_total_limit says"
        )
    return [path for _, _, path in sorted(found, key=lambda each: each[1])][-count:]
