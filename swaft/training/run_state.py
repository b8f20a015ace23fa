"""All that changes as a run goes on, brought into a checkpoint and back, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from swaft.averaging import Engine, WeightAverager
from swaft.averaging.persist import weights_now
from swaft.config import TrainConfig
from swaft.distributed import shared_ranks
from swaft.errors import ConfigError, StateError
from swaft.storage import FileRecord, TensorFile, TensorFileWriter, hash_file, sync_file, sync_folder
from swaft.training.best import BestWeights
from swaft.training.checkpoints import AVERAGE, Checkpoint, delete_old, save_checkpoint
from swaft.training.engine_state import TAG, load_engine, save_engine, zero_stage
from swaft.training.meter import Meter
from swaft.training.position import Position
from swaft.training.random_state import capture_random, restore_random
from swaft.training.run_folder import RunFolder, package_versions

logger = logging.getLogger(__name__)

SUMS = "meter.sums"


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
    settings: TrainConfig
    """Section ``train``."""
    total_steps: int
    """Optimizer steps of the whole run."""
    rows: int
    """Training rows."""

    def save(self) -> None:
        """Write a checkpoint of this step, and delete those of which there are too many (collective).

        Raises:
            StateError: a rank could not write; on every rank, and the checkpoints before are as they were.
        """
        ranks, scaler = self.engine.ranks, self.accelerator.scaler
        metrics_bytes = 0
        with ranks.together(f"{self.folder.path} could not be written"):
            if ranks.is_main:
                metrics_bytes = self.folder.metrics_bytes()
        content = {
            "position": asdict(self.position),
            "run": self._fixed(),
            "applied_steps": self.engine.applied_steps(),
            "weights": weights_now(self.engine),
            "objective_step": getattr(self.objective, "step", 0),
            "best": None if self.best is None else self.best.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "seconds": ranks.gather(self.meter.seconds)[0],
            "metrics_bytes": ranks.gather(metrics_bytes)[0],
            "versions": package_versions(),
        }
        written = save_checkpoint(
            ranks,
            self.folder.path,
            self.position.step,
            write=self._write,
            content=content,
            averaged=self.averager is not None,
        )
        if ranks.is_main:
            delete_old(self.folder.path, self.settings.save_total_limit)
        if written:
            logger.info("checkpoint-%d saved in %s", self.position.step, self.folder.path)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, whose engine state has been loaded by :func:`load_engine_state` (collective).

        Raises:
            StateError: the checkpoint does not fit this run; on every rank.
        """
        content = checkpoint.content
        self.engine.continue_from(content["applied_steps"])
        if weights_now(self.engine) != content["weights"]:
            raise StateError(
                f"{checkpoint.path}: after loading, the trained weights are not those that were saved; versions "
                f"of packages that have changed since: {_changes(content['versions'], package_versions())}"
            )
        if self.averager is not None:
            self.averager.load_state(checkpoint.path / AVERAGE)
        if hasattr(self.objective, "step"):
            self.objective.step = content["objective_step"]
        if self.best is not None:
            with self.engine.ranks.together(f"{self.folder.best} could not be restored"):
                self.best.restore(content["best"])
        if self.accelerator.scaler is not None and content["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        with self.engine.ranks.together(f"{self.folder.path} could not be written"):
            self.folder.cut_metrics(content["metrics_bytes"])
        _place(self.position, content["position"])
        self.position.batches = batches_read(content, self._fixed())
        self.meter.restore(seconds=content["seconds"])
        self._restore_rank(checkpoint)

    def _fixed(self) -> dict[str, Any]:
        """What of a run does not change as it goes on."""
        settings, world_size = self.settings, self.engine.ranks.world_size
        return {
            "engine": self.engine.name,
            "stage": zero_stage(self.model),
            "grouped_by": settings.per_device_train_batch_size * world_size
            if settings.group_by_length
            else None,
            "world_size": self.engine.ranks.world_size,
            "total_steps": self.total_steps,
            "rows": self.rows,
            "per_device_train_batch_size": self.settings.per_device_train_batch_size,
            "seed": self.settings.seed,
        }

    def _write(self, folder: Path) -> Mapping[str, FileRecord]:
        """This rank's files of a checkpoint; a failure of any rank is raised on all, at each part."""
        engine, ranks = self.engine, self.engine.ranks
        with ranks.together(f"{folder / TAG}: the engine's state could not be written"):
            save_engine(self.model, engine.module, engine.inner_optimizer, folder)
        if self.averager is not None:
            self.averager.save_state(folder / AVERAGE)
        files: list[str] = []
        records: dict[str, FileRecord] = {}
        with ranks.together(f"{folder} could not be written"):
            records |= self._write_rank(folder)
            if ranks.is_main:
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

    def _restore_rank(self, checkpoint: Checkpoint) -> None:
        ranks = self.engine.ranks
        before = checkpoint.content["run"]["world_size"]
        if before != ranks.world_size:
            logger.warning(
                "%s was written by %d ranks and is read by %d: the order of the rows goes on, dropout begins anew",
                *(checkpoint.path, before, ranks.world_size),
            )
            set_seed(self.settings.seed + self.position.step, device_specific=True)
            return
        with ranks.together(), TensorFile(checkpoint.path / _rank_file(ranks.rank)) as file:
            tensors = {name: file.read(name) for name in file.names}
            self.meter.sums.copy_(tensors.pop(SUMS))
            restore_random(tensors, file.metadata, self.accelerator.device)


def load_engine_state(
    checkpoint: Checkpoint, accelerator: Accelerator, model: nn.Module, optimizer: Any
) -> None:
    """Put weights and optimizer state of a checkpoint into what ``accelerator.prepare`` returned (collective).

    To be called before an averager is attached.

    Args:
        checkpoint: to go on from.
        accelerator: that prepared both.
        model: as prepared.
        optimizer: as prepared.

    Raises:
        StateError: the state does not fit this engine or number of ranks; on every rank, saying what does.
    """
    before = checkpoint.content["run"]
    world_size = accelerator.num_processes
    stage = zero_stage(model)
    now = "torch alone" if stage is None else f"DeepSpeed stage {stage}"
    if before["stage"] != stage or (stage is not None and before["world_size"] != world_size):
        raise StateError(
            f"{checkpoint.path} was written under {before['engine']} by {before['world_size']} ranks, and this run "
            f"is {now} on {world_size}. DeepSpeed's optimizer state fits one stage and one number of ranks: start "
            f"with those to go on. Its averages fit any engine: averager.load_state('{checkpoint.path / AVERAGE}')"
        )
    with shared_ranks().together(f"{checkpoint.path / TAG}: the engine's state could not be loaded"):
        module: Any = accelerator.unwrap_model(model)
        load_engine(model, module, optimizer.optimizer, checkpoint.path)


def require_same_run(checkpoint: Checkpoint, **run: int) -> None:
    """Refuse to go on with a run of another length, other rows or another seed.

    Args:
        checkpoint: to go on from.
        run: ``total_steps``, ``rows`` and ``seed`` of this run.

    Raises:
        ConfigError: naming each setting that differs.
    """
    before = checkpoint.content["run"]
    settings = {
        "total_steps": "train.max_steps or num_train_epochs",
        "rows": "section data",
        "seed": "train.seed",
    }
    problems = [
        f"{checkpoint.path} is of a run with {name} = {before[name]}, this one has {run[name]}; set {setting} as "
        "it was, or begin a new run in a new train.output_dir"
        for name, setting in settings.items()
        if before[name] != run[name]
    ]
    if problems:
        raise ConfigError(problems)


def batches_read(content: Mapping[str, Any], run: Mapping[str, Any]) -> int:
    """Micro-batches of the pass that a rank of this run has read, when so many rows have been.

    Raises:
        ConfigError: rows of half a batch have been read.
    """
    before = content["run"]
    if content["position"]["batches"] and before["grouped_by"] != run["grouped_by"]:
        raise ConfigError(
            f"the checkpoint stands within a pass over rows of like length, grouped by {before['grouped_by']}, and "
            f"this run groups them by {run['grouped_by']} (train.per_device_train_batch_size times ranks, or "
            "train.group_by_length); set them as they were, for the order of the rows depends on it"
        )
    rows = content["position"]["batches"] * before["per_device_train_batch_size"] * before["world_size"]
    size = run["per_device_train_batch_size"] * run["world_size"]
    if rows % size:
        raise ConfigError(
            f"the checkpoint stands at row {rows:,} of a pass, which is no whole number of this run's "
            f"micro-batches of {size} rows over all ranks; set train.per_device_train_batch_size so that it is "
            f"(it was {before['per_device_train_batch_size']} on {before['world_size']} ranks)"
        )
    return rows // size


def _place(position: Position, values: Mapping[str, Any]) -> None:
    for each in fields(Position):
        setattr(position, each.name, values[each.name])


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _files(folder: Path) -> list[str]:
    """What the engine has written, by every rank."""
    found = [
        path for path in folder.rglob("*") if path.is_file() and AVERAGE not in path.relative_to(folder).parts
    ]
    return sorted(str(path.relative_to(folder)) for path in found if not path.name.startswith("rank-"))


def _settled(path: Path) -> FileRecord:
    """The record of a file that somebody else wrote, once it is on the disk to stay."""
    sync_file(path)
    sync_folder(path.parent)
    return hash_file(path)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    names = sorted({*before, *now})
    changed = [f"{n} {before.get(n)} to {now.get(n)}" for n in names if before.get(n) != now.get(n)]
    return ", ".join(changed) or "none did"
