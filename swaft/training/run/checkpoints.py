"""The checkpoints of a run folder: which exist, which one a run resumes from, which are deleted.

An unfinished checkpoint from a killed run lacks the mark COMPLETE; a damaged one is detected by the files' hashes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from swaft.distributed import Ranks
from swaft.errors import ConfigError, StateAccessError, StateError
from swaft.soup.kinds import AVERAGES, ENGINE, RUN
from swaft.storage import Manifest, is_complete, read_manifest, remove_sealed
from swaft.storage.sealed import find_checkpoints, step_of
from swaft.storage.together import Write, open_together, write_together

logger = logging.getLogger(__name__)

KIND, TAG, AVERAGE = RUN, ENGINE, AVERAGES
"""The kind in a checkpoint's manifest, and its folders: of the engine's files, and of the averages, a state that
`WeightAverager.load_state` opens. `swaft average` and `swaft export` find them by the same names."""


class RunCheckpoint(NamedTuple):
    """A checkpoint of which every byte has been checked."""

    path: Path
    """Its folder."""
    manifest: Manifest
    """Its contents, and what the run wrote about itself; the same on every rank."""


def choose_checkpoint(wanted: str, folder: Path, ranks: Ranks) -> RunCheckpoint | None:
    """Return the checkpoint to resume from, with every byte checked; None: start from scratch (collective).

    Args:
        wanted: ``none``; ``auto``: the newest complete checkpoint in the run folder, or if that is damaged the one
            before it, with a warning; or the path of a checkpoint, which is then the only candidate. A checkpoint
            that cannot be read at the moment, but may be intact, is not skipped.
        folder: folder of the run.
        ranks: rank 0 looks, and sends the others what it finds.

    Raises:
        StateError: the requested checkpoint is damaged, or all are, or the newest that may be intact cannot be
            read; on every rank.
        ConfigError: the requested folder is not a checkpoint, or the run folder holds later ones.
    """
    there: list[Path] = []
    with ranks.together():
        if ranks.is_main:
            there = _candidates(wanted, folder)
            if wanted == "auto":
                _warn_of_unfinished(find_checkpoints(folder, complete=False), there)
    damaged: list[tuple[Path, StateError]] = []
    for path in ranks.gather(there)[0]:
        try:
            chosen = RunCheckpoint(path, open_together(ranks, path, kind=KIND))
        except StateError as found:
            if wanted != "auto" or isinstance(found, StateAccessError):
                raise
            damaged.append((path, found))
            continue
        with ranks.together():
            if ranks.is_main:
                for each, fault in damaged:
                    _put_aside(each, fault, path)
        return chosen
    if damaged:
        raise StateError(
            f"no checkpoint in {folder} can be resumed from, the newest because: {damaged[0][1]}. Nothing was "
            "changed. Start a new run in a new train.output_dir, or set train.resume_from_checkpoint to an intact "
            "one"
        )
    return None


def checkpoint_on_paper(wanted: str, folder: Path) -> RunCheckpoint | None:
    """Return what :func:`choose_checkpoint` would choose, without other ranks or a check of its bytes.

    None: the run starts from scratch, or will itself decide which checkpoints are damaged.
    """
    for path in _candidates(wanted, folder):
        with suppress(StateError) if wanted == "auto" else nullcontext():
            return RunCheckpoint(path, read_manifest(path, kind=KIND))
    return None


def _candidates(wanted: str, folder: Path) -> list[Path]:
    """Return the checkpoints that a run may resume from, best first; see :func:`choose_checkpoint`."""
    there = find_checkpoints(folder) if wanted != "none" else []
    if wanted in ("auto", "none"):
        for path in there:
            if path.is_symlink():
                raise StateAccessError(
                    f"{path} is a symbolic link, but a checkpoint has to be a folder; put the folder itself there"
                )
        return there
    named = Path(wanted)
    if step_of(named) < 0 or not named.is_dir():
        raise ConfigError(
            f"train.resume_from_checkpoint: {named} is not a folder called checkpoint-NUMBER; expected auto, none "
            "or the path of a checkpoint"
        )
    if there and step_of(there[0]) > step_of(named):
        raise ConfigError(
            f"train.output_dir: {folder} holds later checkpoints than {named.name} ({there[0].name}), which would "
            "be overwritten; set train.resume_from_checkpoint=auto to resume from the last, or name a new folder"
        )
    return [named]


def save_checkpoint(
    ranks: Ranks, folder: Path, step: int, *, write: Write, content: Mapping[str, Any]
) -> bool:
    """Write a checkpoint of a step, and return whether it did not exist yet (collective).

    Args:
        ranks: ranks of the run.
        folder: folder of the run.
        step: step of the checkpoint.
        write: as for `write_together`.
        content: what the run says about itself, the same on every rank.

    Raises:
        StateError: a rank could not write; on every rank, with earlier checkpoints unchanged.
    """
    path, there = folder / f"checkpoint-{step}", False
    with ranks.together():
        if ranks.is_main and not (there := is_complete(path)):
            for left in find_checkpoints(folder, complete=False):  # by a killed run; its space may be needed
                shutil.rmtree(left, ignore_errors=True)
    if ranks.gather(there)[0]:
        return False
    write_together(ranks, path, kind=KIND, write=write, content=content)
    return True


def delete_old(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` complete checkpoints (None: keep all), by one process; log what fails."""
    if keep is None:
        return
    try:
        complete = find_checkpoints(folder)
    except StateError as error:
        logger.warning("%s; no checkpoint is deleted", error)
        return
    for path in complete[keep:]:
        try:
            remove_sealed(path)
        except StateError as error:
            logger.warning("%s; it is kept", error)


def _warn_of_unfinished(unfinished: list[Path], complete: list[Path]) -> None:
    """Warn of unfinished checkpoints that are newer than all complete ones."""
    for path in unfinished:
        if not complete or step_of(path) > step_of(complete[0]):
            logger.warning(
                "%s has no mark COMPLETE: it was never finished, and does not count; %s",
                path,
                f"the newest that does is {complete[0].name}" if complete else "the run starts from scratch",
            )


def _put_aside(path: Path, fault: StateError, chosen: Path) -> None:
    """Rename a damaged checkpoint, to free its name for the one that will be written again."""
    aside = path.with_name(f"{path.name}.damaged")
    logger.warning("%s\n  so %s is damaged, and now called %s; resuming from %s", fault, path, aside, chosen)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    except OSError as error:
        raise StateError(f"{path} is damaged and could not be renamed: {error}; delete it") from error
