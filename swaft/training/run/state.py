"""All that changes as a run goes on, brought into a checkpoint and back, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from swaft.averaging import Engine
from swaft.averaging.state import weights_now
from swaft.distributed import shared_ranks
from swaft.errors import StateError
from swaft.storage import FileRecord, TensorFile, TensorFileWriter, hash_file, sync_file, sync_folder
from swaft.training.run.checkpoints import AVERAGE, Checkpoint, delete_old, save_checkpoint
from swaft.training.run.engine_state import TAG, load_engine, save_engine
from swaft.training.run.folder import RunFolder, package_versions
from swaft.training.run.meter import Meter
from swaft.training.run.random_state import capture_random, restore_random
from swaft.training.run.record import (
    RunRecord,
    Setup,
    batches_read,
    changed_settings,
    require_averages,
    require_same_engine,
    require_same_run,
)
from swaft.training.run.step import Position

logger = logging.getLogger(__name__)

SUMS = "meter.sums"
HYPERPARAMETERS = ("weight_decay", "betas", "eps")
"""Of AdamW, beside the rate, which the recipe sets at every step."""


class PlainPart(Protocol):
    """A part of a run whose state is plain JSON values, the same on every rank: an objective, a loss scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Continue from a state."""
        ...


class FilePart(Protocol):
    """A part of a run whose state is files in a folder of its own, written and read by all ranks together."""

    def save_state(self, path: Any) -> None:
        """Write a folder, or nothing where there is nothing to keep (collective)."""
        ...

    def load_state(self, path: Any) -> None:
        """Continue from a folder, or without one (collective)."""
        ...


Part = PlainPart | FilePart
"""What has state in a run; files count where it offers both."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that a checkpoint is made of."""

    accelerator: Accelerator
    """Knows device, ranks and loss scaler."""
    model: nn.Module
    """As prepared."""
    engine: Engine
    """Of the model."""
    meter: Meter
    """What has been summed since the last line of the log."""
    position: Position
    """Where the run stands; the loop moves it."""
    parts: Mapping[str, Any]
    """What else has state, by name: each a `Part`."""
    folder: RunFolder
    """Of the run."""
    setup: Setup
    """What of the run does not change."""
    settings: Mapping[str, Any]
    """Every setting by its full name."""
    save_total_limit: int | None
    """Checkpoints that are kept; None: all of them."""

    def save(self) -> None:
        """Write a checkpoint of this step, and delete those of which there are too many (collective).

        Raises:
            StateError: a rank could not write; on every rank, and the checkpoints before are as they were.
        """
        ranks = self.engine.ranks
        parts = {"position": self.position, "meter": self.meter, **self.parts}
        plain = {name: part.state_dict() for name, part in parts.items() if not _has_files(part)}
        record = RunRecord(
            setup=self.setup,
            settings=self.settings,
            applied_steps=self.engine.applied_steps(),
            weights=weights_now(self.engine),
            parts=ranks.gather(plain)[0],  # times differ from rank to rank
            versions=package_versions(),
        )
        written = save_checkpoint(
            ranks,
            self.folder.path,
            self.position.step,
            write=self._write,
            content=record.as_dict(),
            averaged=AVERAGE in self.parts,
        )
        if ranks.is_main:
            delete_old(self.folder.path, self.save_total_limit)
        if written:
            logger.info("checkpoint-%d saved in %s", self.position.step, self.folder.path)

    def restore(self, chosen: Checkpoint, record: RunRecord) -> None:
        """Continue from a checkpoint, whose engine state has been loaded by :func:`load_engine_state` (collective).

        Args:
            chosen: the checkpoint.
            record: what it says.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run; on every rank.
        """
        checkpoint, ranks = chosen.path, self.engine.ranks
        averages = AVERAGE in chosen.manifest.sealed
        require_averages(record, checkpoint, there=averages, wanted=AVERAGE in self.parts)
        self.engine.continue_from(record.applied_steps)
        if weights_now(self.engine) != record.weights:
            raise StateError(
                f"{checkpoint}: after loading, the trained weights are not those that were saved; versions of "
                f"packages that have changed since: {_changes(record.versions, package_versions())}"
            )
        position = {**record.parts["position"], "batches": batches_read(record, self.setup)}
        with ranks.together(f"{self.folder.path} could not be written"):
            self.folder.restore_metrics(checkpoint)
        for name, part in self.parts.items():
            if _has_files(part):
                part.load_state(checkpoint / name)
            elif name in record.parts:
                with ranks.together(f"{checkpoint}: the state of '{name}' does not fit"):
                    part.load_state_dict(record.parts[name])
        self.position.load_state_dict(position)
        self.meter.load_state_dict(record.parts["meter"])
        if changed := changed_settings(record, self.setup, self.settings):
            logger.warning("%s was written with other settings:\n  %s", checkpoint, "\n  ".join(changed))

    def restore_random(self, checkpoint: Path, record: RunRecord) -> None:
        """Put this rank's generators and sums of the log back, when nothing draws any more before the next step.

        On another number of ranks the generators are seeded anew.
        """
        ranks, world_size = self.engine.ranks, record.setup.world_size
        if world_size != ranks.world_size:
            logger.warning(
                "%s was written by %d ranks and is read by %d: the order of rows continues, dropout begins anew",
                *(checkpoint, world_size, ranks.world_size),
            )
            with ranks.together():
                for rank in range(ranks.rank, world_size, ranks.world_size):
                    with TensorFile(checkpoint / _rank_file(rank)) as file:
                        self.meter.sums += file.read(SUMS).to(self.meter.sums.device)
            set_seed(self.setup.seed + self.position.step, device_specific=True)
            return
        with ranks.together(), TensorFile(checkpoint / _rank_file(ranks.rank)) as file:
            tensors = {name: file.read(name) for name in file.names}
            self.meter.sums.copy_(tensors.pop(SUMS))
            restore_random(tensors, file.metadata, self.accelerator.device)

    def _write(self, folder: Path) -> Mapping[str, FileRecord]:
        """This rank's files of a checkpoint; a failure of any rank is raised on all, at each part."""
        engine, ranks = self.engine, self.engine.ranks
        with ranks.together(f"{folder / TAG}: the engine's state could not be written"):
            save_engine(
                self.model,
                engine.module,
                engine.inner_optimizer,
                folder,
                stepped=engine.applied_steps() > 0,
            )
        for name, part in self.parts.items():
            if _has_files(part):
                part.save_state(folder / name)
        files: list[str] = []
        records: dict[str, FileRecord] = {}
        with ranks.together(f"{folder} could not be written"):
            records |= self._write_rank(folder)
            if ranks.is_main:
                self.folder.save_metrics(folder)
                files = _files(folder)
        files = ranks.gather(files)[0]
        with ranks.together(f"{folder} could not be read back"):
            records |= {each: _settled(folder / each) for each in files[ranks.rank :: ranks.world_size]}
        return records

    def _write_rank(self, folder: Path) -> dict[str, FileRecord]:
        """What differs from rank to rank: generators, and sums of the log."""
        tensors, text = capture_random(self.accelerator.device)
        tensors[SUMS] = self.meter.sums.cpu()
        name = _rank_file(self.engine.ranks.rank)
        described = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        with TensorFileWriter(folder / name, described, metadata=text) as writer:
            for tensor in tensors.values():
                writer.write(tensor)
        return {name: writer.record}


def load_engine_state(
    checkpoint: Checkpoint, accelerator: Accelerator, model: nn.Module, optimizer: Any, setup: Setup
) -> RunRecord:
    """Put weights and optimizer state of a checkpoint into what ``accelerator.prepare`` returned (collective).

    To be called before an averager is attached.

    Args:
        checkpoint: to go on from.
        accelerator: that prepared both.
        model: as prepared.
        optimizer: as prepared.
        setup: of this run.

    Returns:
        What the checkpoint says about its run.

    Raises:
        ConfigError: it is of another run.
        StateError: the state does not fit this engine or number of ranks; on every rank, saying what does.
    """
    ranks, record = shared_ranks(), RunRecord.read(checkpoint.content, checkpoint.path)
    with ranks.together():  # machines may have read models that differ
        require_same_run(record, setup, checkpoint.path)
    require_same_engine(record, setup, checkpoint.path, average=checkpoint.path / AVERAGE)
    # Section train says what they are; a loaded state would bring those it was saved with.
    wanted = [{name: group[name] for name in HYPERPARAMETERS} for group in optimizer.param_groups]
    with ranks.together(f"{checkpoint.path / TAG}: the engine's state could not be loaded"):
        module: Any = accelerator.unwrap_model(model)
        load_engine(
            model,
            module,
            optimizer.optimizer,
            checkpoint.path,
            stepped=record.applied_steps > 0,
        )
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)
    return record


def _has_files(part: Part) -> bool:
    return hasattr(part, "save_state")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _files(folder: Path) -> list[str]:
    """What the engine has written, by every rank, and what the main process has put beside it."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    theirs = [path for path in found if path.parts[0] != AVERAGE and not str(path).startswith("rank-")]
    return sorted(map(str, theirs))


def _settled(path: Path) -> FileRecord:
    """The record of a file that somebody else wrote, once it is on the disk to stay."""
    sync_file(path)
    sync_folder(path.parent)
    return hash_file(path)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = sorted({*before, *now})
    changed = [f"{n} {before.get(n)} to {now.get(n)}" for n in names if before.get(n) != now.get(n)]
    return ", ".join(changed) or "none did"
