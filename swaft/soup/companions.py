"""What lies beside weights in a Hugging Face folder: configuration, tokenizer, code; and a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from swaft.soup.huggingface import ADAPTER_CONFIG, read_json
from swaft.storage import sync_file, sync_folder
from swaft.storage.files import explained
from swaft.storage.model_card import CARD, in_one_line, write_card

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".index.json",
)
"""How the names of weights end, and of the state of training. They are not copied."""
LEFT_NAMES = ("trainer_state.json", "manifest.json", "COMPLETE", "latest", "average.json", CARD)
"""Other files that are not copied: they tell of the checkpoint, and not of what is made of it."""


def copy_files(source: Path, folder: Path, left: Collection[str] = LEFT_NAMES) -> list[str]:
    """Copy configuration, tokenizer and code of a Hugging Face folder: all but weights and what training keeps.

    Folders inside are copied likewise, but for those that hold weights of their own, as the checkpoints of a run
    do, and for links to folders. Links to files are followed, as in the hub's cache. What is copied is on the disk.

    Args:
        source: the Hugging Face folder.
        folder: to copy to; it is there.
        left: names of files that are not copied, in folders inside not meant.

    Returns:
        What was left out that may be missed, in words.

    Raises:
        StateError: a file could not be read or written.
    """
    notes = []
    with explained(source, "copied"):
        for path in _visible(source):
            if path.is_file():
                if path.name not in left and not _is_left(path.name):
                    shutil.copyfile(path, folder / path.name)
                    sync_file(folder / path.name)
            elif path.is_dir() and not path.is_symlink():
                if held := _first_weights(path):
                    notes.append(f"{path} is not copied: it holds weights of its own ({held})")
                    continue
                (folder / path.name).mkdir()
                notes += copy_files(path, folder / path.name, left=())
                if not any((folder / path.name).iterdir()):
                    (folder / path.name).rmdir()
    sync_folder(folder)
    return notes


def describe(
    folder: Path, *, title: str, shares: Sequence[tuple[str, float]], dtype: str, sha256: str
) -> None:
    """Write a model card that says what was averaged.

    Args:
        folder: of the weights.
        title: of the card.
        shares: what was averaged, in words, and the part that each has in the mean.
        dtype: of the weights.
        sha256: their hash, as in `average.json`.

    Raises:
        StateError: it could not be written.
    """
    told = "the weighted mean of these checkpoints" if len(shares) > 1 else "the weights of this checkpoint"
    body = [
        f"This folder holds {told}, in {dtype}, written by swaft:",
        "",
        *(f"* {share:.6g} of `{in_one_line(name)}`" for name, share in shares),
        "",
        f"SHA-256 of the weights: `{sha256}` (`average.json` says more).",
    ]
    if (folder / ADAPTER_CONFIG).exists():
        base_model = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        write_card(folder, title=title, body=body, library="peft", base_model=base_model)
    else:
        write_card(folder, title=title, body=body)


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _is_left(name: str) -> bool:
    return name.endswith((*WEIGHTS, ".tmp")) or name.startswith("events.out.tfevents")


def _first_weights(folder: Path) -> str | None:
    """The first file of weights anywhere in a folder."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if name.endswith(WEIGHTS):
                return str((Path(parent) / name).relative_to(folder))
    return None
