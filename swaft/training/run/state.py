"""Saves everything that changes during a run to a checkpoint, and restores it bit for bit.

accelerate's `save_state` does not: it pickles generators, which is unsafe to load, keeps only rank 0's copy of
registered objects, and leaves a folder that looks complete after a rank has failed.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from swaft.averaging.state import same_weights, weights_now
from swaft.distributed import shared_ranks
from swaft.environment import package_versions
from swaft.errors import ConfigError, StateError
from swaft.storage import FileRecord, Spec, TensorFile, hash_file, sync_file, sync_folder, write_tensors
from swaft.training.config import flatten
from swaft.training.run.checkpoints import AVERAGE, TAG, RunCheckpoint, delete_old, save_checkpoint
from swaft.training.run.engine_state import load_engine, save_engine
from swaft.training.run.record import (
    RunRecord,
    Setup,
    batches_read,
    changed_settings,
    require_averages,
    require_same_run,
)

if TYPE_CHECKING:
    from swaft.training.run.run import Run

logger = logging.getLogger(__name__)

SUMS = "meter.sums"
RANDOM, RANDOM_OF_DEVICE = "random", "random.device"
"""Names in a rank's file: the text stored with its tensors, and the tensor of the device's generator."""
HYPERPARAMETERS = ("weight_decay", "betas", "eps")
"""AdamW's options besides the learning rate, which the recipe sets at every step."""


class RunState:
    """Everything that changes during a run."""

    def __init__(self, run: Run, setup: Setup):
        self.run, self._setup = run, setup
        self._ranks, self._settings = shared_ranks(), flatten(run.config)
        self._resumed: tuple[RunCheckpoint, RunRecord] | None = None
        self._plain: dict[str, Any] = {}  # the parts whose state is plain values, by name
        self._in_files: dict[str, Any] = {}  # those whose state is files

    @property
    def first_step(self) -> int:
        """Applied steps of the checkpoint; 0 if the run starts from scratch."""
        return self._resumed[1].applied_steps if self._resumed else 0

    def load_engine(self, checkpoint: RunCheckpoint) -> None:
        """Load a checkpoint's weights and optimizer state into what the engine has prepared (collective).

        To be called before an averager is attached.

        Raises:
            ConfigError: the checkpoint is from another run.
            StateError: the state does not fit this engine or number of ranks, with the ones it fits; on every rank.
        """
        run, path, ranks = self.run, checkpoint.path, self._ranks
        record = RunRecord.read(checkpoint.manifest.content, path)
        with ranks.together():  # machines may have read models that differ
            require_same_run(record, self._setup, path)
        groups = run.optimizer.param_groups
        # Section train sets these; a loaded state would overwrite them with the saved ones.
        wanted = [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in groups]
        with ranks.together(f"{path / TAG}: the engine's state could not be loaded"):
            module: Any = run.accelerator.unwrap_model(run.model)
            load_engine(run.model, module, run.optimizer.optimizer, path)
        for group, values in zip(run.optimizer.param_groups, wanted, strict=True):
            group.update(values)
        self._resumed = checkpoint, record

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Continue from the checkpoint of :meth:`load_engine`, if there is one (collective).

        Args:
            parts: other objects with state, by name, as for `Run.begin`; those without state are ignored.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run, or a part's state is not plain values.
        """
        run, engine = self.run, self.run.engine
        self._in_files = {name: part for name, part in parts.items() if hasattr(part, "save_state")}
        others = {name: part for name, part in parts.items() if name not in self._in_files}
        self._plain = {name: part for name, part in others.items() if hasattr(part, "state_dict")}
        _require_plain(self._plain)
        self._plain |= {"position": run.position, "meter": run.meter}
        if self._resumed is None:
            return
        (path, manifest), record = self._resumed
        there, wanted = AVERAGE in manifest.sealed, AVERAGE in self._in_files
        require_averages(record, path, there=there, wanted=wanted)
        engine.continue_from(record.applied_steps)
        if weights_now(engine) != record.weights:
            raise StateError(
                f"{path}: after loading, the trained weights are not those that were saved; versions of "
                f"packages that have changed since: {_changed(record.versions, package_versions())}"
            )
        position = {**record.parts["position"], "batches": batches_read(record, self._setup)}
        for name, state in {**record.parts, "position": position}.items():
            with self._ranks.together(f"{path}: the state of '{name}' does not fit"):
                if name in self._plain:
                    self._plain[name].load_state_dict(state)
        # Parts in files change the run folder (`best`, the log), so they come once the others have fitted.
        for name, part in self._in_files.items():
            part.load_state(path / name)
        with self._ranks.together(f"{run.folder.path} could not be written"):
            run.folder.restore_metrics(path)
        if changes := list(changed_settings(record, self._setup, self._settings)):
            logger.warning("%s was written with other settings:\n  %s", path, "\n  ".join(changes))

    def restore_random(self) -> None:
        """Restore this rank's generators and log sums, once nothing else uses the generators before the next step.

        With a different number of ranks the generators are reseeded.
        """
        if self._resumed is None:
            return
        (path, _), record = self._resumed
        ranks, before, meter = self._ranks, record.setup.world_size, self.run.meter
        with ranks.together():
            for rank in range(ranks.rank, before, ranks.world_size):
                with TensorFile(path / _rank_file(rank)) as file:
                    tensors, text = {name: file.read(name) for name in file.specs}, file.metadata
                meter.sums += tensors.pop(SUMS).to(meter.sums.device)
                if before == ranks.world_size:
                    restore_random(tensors, text, self.run.accelerator.device)
        if before != ranks.world_size:
            logger.warning(
                "%s was written by %d ranks and is read by %d: the order of rows continues, dropout is reseeded",
                *(path, before, ranks.world_size),
            )
            set_seed(self._setup.seed + self.run.position.step, device_specific=True)

    def save(self) -> None:
        """Write a checkpoint of this step, and delete surplus ones (collective).

        Raises:
            StateError: a rank could not write; on every rank, with earlier checkpoints unchanged.
        """
        run, folder = self.run, self.run.folder.path
        with same_weights(run.engine) as weights:
            record = RunRecord(
                setup=self._setup,
                settings=self._settings,
                applied_steps=run.applied_steps,
                weights=weights,
                # Times differ from rank to rank.
                parts=self._ranks.gather({name: part.state_dict() for name, part in self._plain.items()})[0],
                versions=package_versions(),
            )
            written = save_checkpoint(
                self._ranks,
                folder,
                run.position.step,
                write=self._write,
                content=asdict(record),
            )
        if self._ranks.is_main:
            delete_old(folder, run.config.train.save_total_limit)
        if written:
            logger.info("checkpoint-%d saved in %s", run.position.step, folder)

    def _write(self, folder: Path) -> Mapping[str, FileRecord]:
        """Write this rank's files of a checkpoint; after each part, any rank's failure is raised on all."""
        run, ranks = self.run, self._ranks
        with ranks.together(f"{folder / TAG}: the engine's state could not be written"):
            save_engine(run.model, run.engine.module, run.engine.inner_optimizer, folder)
        for name, part in self._in_files.items():
            part.save_state(folder / name)
        files: list[str] = []
        records: dict[str, FileRecord] = {}
        with ranks.together(f"{folder} could not be written"):
            records |= self._write_rank(folder)
            if ranks.is_main:
                run.folder.save_metrics(folder)
                there = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
                own = sorted(str(path) for path in there if path.parts[0] != AVERAGE)
                files = [name for name in own if not name.startswith("rank-")]
        files = ranks.gather(files)[0]
        with ranks.together(f"{folder} could not be read back"):
            for name in files[ranks.rank :: ranks.world_size]:
                sync_file(folder / name)
                sync_folder((folder / name).parent)
                records[name] = hash_file(folder / name)
        return records

    def _write_rank(self, folder: Path) -> dict[str, FileRecord]:
        """Write what differs between ranks: generators, and log sums."""
        tensors, text = capture_random(self.run.accelerator.device)
        tensors[SUMS] = self.run.meter.sums.cpu()
        name = _rank_file(self._ranks.rank)
        specs = {key: Spec.of(tensor) for key, tensor in tensors.items()}
        return {name: write_tensors(folder / name, specs, lambda key: [tensors[key]], metadata=text)}


def capture_random(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state of Python's, numpy's and torch's generators, including the device's.

    It is tensors by name, 1-dim (torch's state uint8, the others' words int64), and text.
    """
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if device.type != "cpu":
        tensors[RANDOM_OF_DEVICE] = torch.get_device_module(device).get_rng_state(device)
    return tensors, {RANDOM: json.dumps({"python": [version, gauss], "numpy": [name, *rest]})}


def restore_random(tensors: Mapping[str, Tensor], text: Mapping[str, str], device: torch.device) -> None:
    """Restore every generator to the state from :func:`capture_random`."""
    others = json.loads(text[RANDOM])
    (version, gauss), (name, *rest) = others["python"], others["numpy"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), gauss))
    np.random.set_state((name, tensors["random.numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["random.torch"])
    if RANDOM_OF_DEVICE in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[RANDOM_OF_DEVICE], device)


def _require_plain(parts: Mapping[str, Any]) -> None:
    """Refuse, before training, a part whose `state_dict` no checkpoint could hold."""
    for name, part in parts.items():
        try:
            json.dumps(part.state_dict())
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"run.begin: the state of '{name}' cannot be saved: {error}. Expected plain JSON values from its "
                "state_dict, or files from save_state and load_state"
            ) from error


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """List the packages whose versions differ."""
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    return ", ".join(f"{name} {then.get(name)} to {now.get(name)}" for name in names) or "none did"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
