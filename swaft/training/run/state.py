"""All that changes as a run goes on, brought into a checkpoint and back, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from swaft.averaging import Engine, WeightAverager
from swaft.averaging.persist import weights_now
from swaft.distributed import shared_ranks
from swaft.errors import StateError
from swaft.storage import FileRecord, TensorFile, TensorFileWriter, hash_file, sync_file, sync_folder
from swaft.training.best import BestWeights
from swaft.training.meter import Meter
from swaft.training.run.checkpoints import AVERAGE, Checkpoint, delete_old, save_checkpoint
from swaft.training.run.engine_state import TAG, load_engine, save_engine
from swaft.training.run.folder import RunFolder, package_versions
from swaft.training.run.position import Position
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

logger = logging.getLogger(__name__)

SUMS = "meter.sums"
HYPERPARAMETERS = ("weight_decay", "betas", "eps")
"""Of AdamW, beside the rate, which the schedule sets at every step."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The parts of a run that a checkpoint is made of."""

    accelerator: Accelerator
    """Knows device, ranks and loss scaler."""
    model: nn.Module
    """As prepared."""
    engine: Engine
    """Of the model."""
    averager: WeightAverager | None
    """None without averaging."""
    objective: Any
    """Whose noise depends on how many micro-batches it has seen."""
    meter: Meter
    """What has been summed since the last line of the log."""
    best: BestWeights | None
    """None where no weights are chosen while training."""
    position: Position
    """Where the run stands; the training loop moves it."""
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
        ranks, scaler = self.engine.ranks, self.accelerator.scaler
        seconds, logged_at_s = ranks.gather((self.meter.seconds, self.meter.logged_at_s))[0]
        record = RunRecord(
            setup=self.setup,
            settings=self.settings,
            position=asdict(self.position),
            applied_steps=self.engine.applied_steps(),
            weights=weights_now(self.engine),
            objective=self.objective.state_dict(),
            best=None if self.best is None else self.best.state(),
            scaler=None if scaler is None else scaler.state_dict(),
            seconds=seconds,
            logged_at_s=logged_at_s,
            versions=package_versions(),
        )
        written = save_checkpoint(
            ranks,
            self.folder.path,
            self.position.step,
            write=self._write,
            content=record.as_dict(),
            averaged=self.averager is not None,
        )
        if ranks.is_main:
            delete_old(self.folder.path, self.save_total_limit)
        if written:
            logger.info("checkpoint-%d saved in %s", self.position.step, self.folder.path)

    def restore(self, chosen: Checkpoint, record: RunRecord) -> None:
        """Go on from a checkpoint, whose engine state has been loaded by :func:`load_engine_state` (collective).

        Args:
            chosen: the checkpoint.
            record: what it says.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run; on every rank.
        """
        checkpoint = chosen.path
        averages = AVERAGE in chosen.manifest.sealed
        require_averages(record, checkpoint, there=averages, wanted=self.averager is not None)
        self.engine.continue_from(record.applied_steps)
        if weights_now(self.engine) != record.weights:
            raise StateError(
                f"{checkpoint}: after loading, the trained weights are not those that were saved; versions of "
                f"packages that have changed since: {_changes(record.versions, package_versions())}"
            )
        batches = batches_read(record, self.setup)
        if self.averager is not None:
            self.averager.load_state(checkpoint / AVERAGE)
        self.objective.load_state_dict(dict(record.objective))
        if self.best is not None and record.best is not None:
            with self.engine.ranks.together(f"{self.folder.best} could not be restored"):
                self.best.restore(record.best, checkpoint, chosen.manifest.files.keys())
        if self.accelerator.scaler is not None and record.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(record.scaler))
        with self.engine.ranks.together(f"{self.folder.path} could not be written"):
            self.folder.restore_metrics(checkpoint)
        for name, value in {**record.position, "batches": batches}.items():
            setattr(self.position, name, value)
        self.meter.restore(seconds=record.seconds, logged_at_s=record.logged_at_s)
        if changed := changed_settings(record, self.setup, self.settings):
            logger.warning("%s was written with other settings:\n  %s", checkpoint, "\n  ".join(changed))

    def restore_random(self, checkpoint: Path, record: RunRecord) -> None:
        """Put this rank's generators and sums of the log back, when nothing draws any more before the next step.

        On another number of ranks the generators are seeded anew.
        """
        ranks, world_size = self.engine.ranks, record.setup.world_size
        if world_size != ranks.world_size:
            logger.warning(
                "%s was written by %d ranks and is read by %d: the order of the rows goes on, dropout begins anew",
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
        if self.averager is not None:
            self.averager.save_state(folder / AVERAGE)
        files: list[str] = []
        records: dict[str, FileRecord] = {}
        with ranks.together(f"{folder} could not be written"):
            records |= self._write_rank(folder)
            if ranks.is_main:
                self.folder.save_metrics(folder)
                if self.best is not None:
                    self.best.save(folder)
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
