"""All that changes during a run, brought into a checkpoint and back, to the bit.

accelerate's `save_state` pickles generators, which is unsafe to open, keeps rank 0's copy of registered objects
alone, and leaves a folder that looks complete where a rank has failed.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from swaft.averaging.state import weights_now
from swaft.distributed import shared_ranks
from swaft.errors import StateError
from swaft.storage import FileRecord, TensorFile, TensorFileWriter, hash_file, sync_file, sync_folder
from swaft.training.config import flatten
from swaft.training.run.checkpoints import AVERAGE, RunCheckpoint, delete_old, save_checkpoint
from swaft.training.run.engine_state import TAG, load_engine, save_engine
from swaft.training.run.folder import package_versions
from swaft.training.run.record import (
    RunRecord,
    Setup,
    batches_read,
    changed_settings,
    require_averages,
    require_same_engine,
    require_same_run,
)

if TYPE_CHECKING:
    from swaft.training.run.run import Run

logger = logging.getLogger(__name__)

SUMS = "meter.sums"
RANDOM, RANDOM_OF_DEVICE = "random", "random.device"
"""Of a rank's file: the text beside its tensors that is no vector, and the tensor of the device's generator."""
HYPERPARAMETERS = ("weight_decay", "betas", "eps")
"""Of AdamW, beside the rate, which the recipe sets at every step."""


class PlainPart(Protocol):
    """A part of a run whose state is plain JSON values, the same on every rank: an objective, a loss scaler."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: Any) -> Any: ...  # noqa: D102


class FilePart(Protocol):
    """A part of a run whose state is files in a folder of its own, written and read by all ranks together.

    It may write no folder, and be asked to continue from one that is not there.
    """

    def save_state(self, path: Any) -> None: ...  # noqa: D102

    def load_state(self, path: Any) -> None: ...  # noqa: D102


Part = PlainPart | FilePart
"""What has state in a run; files count where it offers both."""


class RunState:
    """All that a checkpoint is made of.

    Args:
        run: whose model, meter and position are saved.
        setup: what of the run does not change.
        parts: what else has state, by name.
    """

    def __init__(self, run: Run, setup: Setup, parts: Mapping[str, Part]):
        self.run, self.parts = run, parts
        self._setup, self._ranks, self._settings = setup, run.engine.ranks, flatten(run.config)
        self._in_files: dict[str, Any] = {n: part for n, part in parts.items() if hasattr(part, "save_state")}
        self._plain: dict[str, Any] = {n: part for n, part in parts.items() if n not in self._in_files}

    def save(self) -> None:
        """Write a checkpoint of this step, and delete those of which there are too many (collective).

        Raises:
            StateError: a rank could not write; on every rank, and the checkpoints before are as they were.
        """
        run, folder = self.run, self.run.folder.path
        plain = {"position": run.position, "meter": run.meter, **self._plain}
        states = {name: part.state_dict() for name, part in plain.items()}
        record = RunRecord(
            setup=self._setup,
            settings=self._settings,
            applied_steps=run.applied_steps,
            weights=weights_now(run.engine),
            parts=self._ranks.gather(states)[0],  # times differ from rank to rank
            versions=package_versions(),
        )
        written = save_checkpoint(
            self._ranks,
            folder,
            run.position.step,
            write=self._write,
            content=asdict(record),
            averaged=AVERAGE in self.parts,
        )
        if self._ranks.is_main:
            delete_old(folder, run.config.train.save_total_limit)
        if written:
            logger.info("checkpoint-%d saved in %s", run.position.step, folder)

    def restore(self, chosen: RunCheckpoint, record: RunRecord) -> None:
        """Continue from a checkpoint, whose engine state has been loaded by :func:`load_engine_state` (collective).

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run; on every rank.
        """
        run, checkpoint, engine = self.run, chosen.path, self.run.engine
        averages = AVERAGE in chosen.manifest.sealed
        require_averages(record, checkpoint, there=averages, wanted=AVERAGE in self.parts)
        engine.continue_from(record.applied_steps)
        if weights_now(engine) != record.weights:
            then, now = record.versions, package_versions()
            changed = [
                f"{n} {then.get(n)} to {now.get(n)}" for n in {*then, *now} if then.get(n) != now.get(n)
            ]
            raise StateError(
                f"{checkpoint}: after loading, the trained weights are not those that were saved; versions of "
                f"packages that have changed since: {', '.join(sorted(changed)) or 'none did'}"
            )
        position = {**record.parts["position"], "batches": batches_read(record, self._setup)}
        with self._ranks.together(f"{run.folder.path} could not be written"):
            run.folder.restore_metrics(checkpoint)
        for name, part in self._in_files.items():
            part.load_state(checkpoint / name)
        for name in [name for name in self._plain if name in record.parts]:
            with self._ranks.together(f"{checkpoint}: the state of '{name}' does not fit"):
                self._plain[name].load_state_dict(record.parts[name])
        run.position.load_state_dict(position)
        run.meter.load_state_dict(record.parts["meter"])
        if changes := list(changed_settings(record, self._setup, self._settings)):
            logger.warning("%s was written with other settings:\n  %s", checkpoint, "\n  ".join(changes))

    def restore_random(self, checkpoint: Path, record: RunRecord) -> None:
        """Put this rank's generators and sums of the log back, when nothing draws any more before the next step.

        On another number of ranks the generators are seeded anew.
        """
        ranks, world_size, meter = self._ranks, record.setup.world_size, self.run.meter
        if world_size == ranks.world_size:
            with ranks.together(), TensorFile(checkpoint / _rank_file(ranks.rank)) as file:
                tensors = {name: file.read(name) for name in file.names}
                meter.sums.copy_(tensors.pop(SUMS))
                restore_random(tensors, file.metadata, self.run.accelerator.device)
            return
        logger.warning(
            "%s was written by %d ranks and is read by %d: the order of rows continues, dropout begins anew",
            *(checkpoint, world_size, ranks.world_size),
        )
        with ranks.together():
            for rank in range(ranks.rank, world_size, ranks.world_size):
                with TensorFile(checkpoint / _rank_file(rank)) as file:
                    meter.sums += file.read(SUMS).to(meter.sums.device)
        set_seed(self._setup.seed + self.run.position.step, device_specific=True)

    def _write(self, folder: Path) -> Mapping[str, FileRecord]:
        """This rank's files of a checkpoint; a failure of any rank is raised on all, at each part."""
        run, ranks = self.run, self._ranks
        with ranks.together(f"{folder / TAG}: the engine's state could not be written"):
            engine, stepped = run.engine, run.applied_steps > 0
            save_engine(run.model, engine.module, engine.inner_optimizer, folder, stepped=stepped)
        for name, part in self._in_files.items():
            part.save_state(folder / name)
        files: list[str] = []
        records: dict[str, FileRecord] = {}
        with ranks.together(f"{folder} could not be written"):
            records |= self._write_rank(folder)
            if ranks.is_main:
                run.folder.save_metrics(folder)
                there = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
                files = sorted(str(path) for path in there if path.parts[0] != AVERAGE)
                files = [name for name in files if not name.startswith("rank-")]
        files = ranks.gather(files)[0]
        with ranks.together(f"{folder} could not be read back"):
            for name in files[ranks.rank :: ranks.world_size]:
                sync_file(folder / name)
                sync_folder((folder / name).parent)
                records[name] = hash_file(folder / name)
        return records

    def _write_rank(self, folder: Path) -> dict[str, FileRecord]:
        """What differs from rank to rank: generators, and sums of the log."""
        tensors, text = capture_random(self.run.accelerator.device)
        tensors[SUMS] = self.run.meter.sums.cpu()
        name = _rank_file(self._ranks.rank)
        described = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        with TensorFileWriter(folder / name, described, metadata=text) as writer:
            for tensor in tensors.values():
                writer.write(tensor)
        return {name: writer.record}


def load_engine_state(
    checkpoint: RunCheckpoint, accelerator: Accelerator, model: nn.Module, optimizer: Any, setup: Setup
) -> RunRecord:
    """Put weights and optimizer state of a checkpoint into what ``accelerator.prepare`` returned (collective).

    To be called before an averager is attached. Returns what the checkpoint says about its run.

    Raises:
        ConfigError: it is of another run.
        StateError: the state does not fit this engine or number of ranks; on every rank, saying what does.
    """
    path, ranks = checkpoint.path, shared_ranks()
    record = RunRecord.read(checkpoint.manifest.content, path)
    with ranks.together():  # machines may have read models that differ
        require_same_run(record, setup, path)
    require_same_engine(record, setup, path, average=path / AVERAGE)
    # Section train says what they are; a loaded state would bring those it was saved with.
    wanted = [
        {name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups
    ]
    with ranks.together(f"{path / TAG}: the engine's state could not be loaded"):
        module: Any = accelerator.unwrap_model(model)
        load_engine(model, module, optimizer.optimizer, path, stepped=record.applied_steps > 0)
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        group.update(values)
    return record


def capture_random(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take the state of Python's, numpy's and torch's generators, the device's included.

    Tensors by name, 1-dim (torch's state uint8, the others' words int64), and text beside them.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if device.type != "cpu":
        tensors[RANDOM_OF_DEVICE] = torch.get_device_module(device).get_rng_state(device)
    rest = {"python": [version, gauss], "numpy": [name, position, has_gauss, cached]}
    return tensors, {RANDOM: json.dumps(rest)}


def restore_random(tensors: Mapping[str, Tensor], text: Mapping[str, str], device: torch.device) -> None:
    """Put every generator back to where :func:`capture_random` found it."""
    rest = json.loads(text[RANDOM])
    version, gauss = rest["python"]
    name, position, has_gauss, cached = rest["numpy"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), gauss))
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["random.torch"])
    if RANDOM_OF_DEVICE in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[RANDOM_OF_DEVICE], device)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
