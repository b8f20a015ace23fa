"""Which kind of checkpoint a folder is, and which checkpoints a run left."""

from __future__ import annotations

import re
from pathlib import Path

from swaft.averaging.state import KIND as AVERAGE
from swaft.errors import StateError
from swaft.soup.checkpoint import Checkpoint
from swaft.soup.huggingface import HuggingFaceFolder, holds_weights
from swaft.soup.state import AverageFolder
from swaft.soup.zero import ZeroFolder, find_tag
from swaft.storage import is_complete, read_manifest, verify
from swaft.storage.files import explained

ENGINE = "engine"
"""Folder of DeepSpeed's files inside a checkpoint of a swaft run."""

NUMBERED = re.compile(r"(.*?)([0-9]{1,18})")


def open_checkpoint(path: Path, *, trust_pickle: bool = False, rule: str | None = None) -> Checkpoint:
    """Open a checkpoint of any kind that is known.

    Args:
        path: its folder.
        trust_pickle: whether files of Python pickle may be opened.
        rule: of a state of averages, which of them.

    Raises:
        StateError: it is no checkpoint that is known, or damaged.
    """
    if not path.is_dir():
        raise StateError(f"{path} is no folder; expected the folder of a checkpoint")
    if holds_weights(path):
        return HuggingFaceFolder(path)
    if is_complete(path):
        manifest = read_manifest(path, kind=None)
        if manifest.kind == AVERAGE:
            return AverageFolder(path, rule=rule)
        verify(path, manifest, names=[name for name in manifest.files if name.startswith(f"{ENGINE}/")])
    if find_tag(path) is not None:
        return ZeroFolder(path, trust_pickle=trust_pickle)
    raise StateError(
        f"{path} is no checkpoint that can be averaged; expected a folder with model.safetensors or its index, "
        "with adapter_model.safetensors, a DeepSpeed checkpoint of ZeRO 1 to 3, or a saved state of averages. Of "
        "others (pytorch_model.bin, torch's distributed checkpoints) write a Hugging Face folder first, with "
        "save_pretrained"
    )


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The last checkpoints of a run, the oldest first, by the step in their names.

    Args:
        run: folder with folders called `checkpoint-500` or the like.
        count: how many.

    Raises:
        StateError: there are fewer, or their names are not alike.
    """
    with explained(run, "listed"):
        found = [
            (match[1], int(match[2]), path)
            for path in sorted(run.iterdir())
            if path.is_dir() and (match := NUMBERED.fullmatch(path.name))
        ]
    if any(is_complete(path) for _, _, path in found):  # then one without a mark was never finished
        found = [each for each in found if is_complete(each[2])]
    names = ", ".join(path.name for _, _, path in found) or "none"
    if len({prefix for prefix, _, _ in found}) > 1 or len({step for _, step, _ in found}) < len(found):
        raise StateError(
            f"{run}: which checkpoints follow each other is not clear ({names}); name them one by one"
        )
    if len(found) < count:
        raise StateError(f"{run} holds {len(found)} numbered checkpoints ({names}); --last asks for {count}")
    return [path for _, _, path in sorted(found, key=lambda each: each[1])][-count:]
