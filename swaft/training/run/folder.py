"""The folder of a run: what was run, with what, and what came out.

Two runs that write to one folder would leave an inseparable mixture of both, so it is locked.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator

from swaft.distributed import shared_ranks
from swaft.environment import software
from swaft.errors import ConfigError, StateError
from swaft.storage import write_durably
from swaft.storage.files import TEMPORARY
from swaft.storage.together import require_shared
from swaft.training.launch.failure import launch_command
from swaft.training.run.checkpoints import RunCheckpoint, choose_checkpoint, find_checkpoints

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
OF_A_RUN = {"config.yaml", METRICS, "summary.json"}
"""Files that identify a run folder."""
LOCK = ".lock"
LOCK_PATIENCE_S = 10.0
"""Seconds to wait for processes of a killed run, such as data loader workers, to end."""


class RunFolder:
    """A folder that belongs to one run; only the main process writes to it.

    Use `RunFolder.create`; the attributes are plain paths, readable on every rank.

    Args:
        path: path of the folder. ``final``, ``final_averaged`` and ``best`` in it are Hugging Face folders with the
            last weights, the averaged ones, and those that scored best on validation rows.
        is_main: whether this process writes.
        checkpoint: what the run resumes from; None: it starts from scratch.
    """

    def __init__(self, path: Path, *, is_main: bool, checkpoint: RunCheckpoint | None = None):
        self.path, self.is_main, self.checkpoint = path, is_main, checkpoint
        self.final, self.final_averaged, self.best = path / "final", path / "final-averaged", path / "best"
        self.failure: StateError | None = None
        """The first write error. Only the main process writes, so it is raised where all ranks next meet."""
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        accelerator: Accelerator,
        *,
        resume: str = "none",
        config_yaml: str = "",
    ) -> RunFolder:
        """Claim ``path`` for this run, or for the rest of it (collective).

        Only the main process looks and creates, so no rank sees what another has just made. With a `resume`, the
        folder may already hold this run if it is unfinished: one with checkpoints, or one started with the same
        configuration that ended before the first checkpoint. A run that started from another run's checkpoint, and
        is started again in the same way, goes on from its own.

        Args:
            path: path of the folder.
            accelerator: knows the ranks.
            resume: ``train.resume_from_checkpoint``.
            config_yaml: this run's configuration.

        Raises:
            ConfigError: the folder holds something else, cannot be made, or is not shared by all machines; on every
                rank.
            StateError: no checkpoint that may be resumed from is intact; on every rank.
        """
        path, ranks = Path(path), shared_ranks()
        folder = cls(path, is_main=accelerator.is_main_process)
        with ranks.together(f"train.output_dir: {path} cannot be claimed"):
            if folder.is_main:
                folder._lock = _claim(path, resume=resume, config_yaml=config_yaml)
        wanted = resume
        with ranks.together():
            require_shared(path / LOCK, "train.output_dir")
            if folder.is_main:
                wanted = resume_from(path, resume=resume, config_yaml=config_yaml)
        wanted = ranks.gather(wanted)[0]
        folder.checkpoint = choose_checkpoint(wanted, path, ranks)
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file completely or not at all; a write error is kept in `failure`."""
        with self._noting_failure(name):
            if self.is_main:
                write_durably(self.path / name, text.encode(errors="surrogateescape"))  # paths of any bytes

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file completely or not at all; infinite numbers become text, because JSON has none."""
        self.write_text(name, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; a write error is kept in `failure`."""
        with self._noting_failure(METRICS):
            if self.is_main:
                with (self.path / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

    def release(self) -> None:
        """Release the folder at the end of a run: from then on summary.json keeps other runs out."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()

    def save_metrics(self, checkpoint: Path) -> None:
        """Copy the current metrics.jsonl into a checkpoint; to be called by one process."""
        file = self.path / METRICS
        (checkpoint / METRICS).write_bytes(file.read_bytes() if file.exists() else b"")

    def restore_metrics(self, checkpoint: Path) -> None:
        """Restore metrics.jsonl from :meth:`save_metrics`; later steps will be logged again."""
        if self.is_main:
            write_durably(self.path / METRICS, (checkpoint / METRICS).read_bytes())

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except StateError as error:
            self.failure = self.failure or StateError(str(error))
        except OSError as error:
            self.failure = self.failure or StateError(f"{self.path / name} could not be written: {error}")

    def begin(self, config_yaml: str, accelerator: Accelerator, *, engine: str) -> None:
        """Delete results of an earlier run, and write down what is run (collective).

        To be called once nothing can refuse the run any more: until then, what an earlier run left is kept.
        Writes config.yaml, command.txt, env.json, and ds_config.json under DeepSpeed.

        Args:
            config_yaml: the resolved configuration.
            accelerator: after ``prepare``, when accelerate has filled the rest of the DeepSpeed configuration.
            engine: name of the training engine.

        Raises:
            StateError: the folder could not be written; on every rank.
        """
        comes_anew = [self.final, self.final_averaged]
        if self.checkpoint is None:
            comes_anew += [self.best, self.path / METRICS]
        ranks = shared_ranks()
        with ranks.together(f"{self.path} could not be cleared of what an earlier run left"):
            if self.is_main:
                for folder in (self.final, self.final_averaged, self.best):
                    comes_anew += self.path.glob(f".{folder.name}.*")  # half-written when the run ended
                for each in comes_anew:
                    shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
        self.write_text("config.yaml", config_yaml)
        self.write_text("command.txt", shlex.join(launch_command()) + "\n")
        self.write_json("env.json", environment(accelerator, engine=engine))
        if accelerator.state.deepspeed_plugin is not None:
            self.write_json("ds_config.json", accelerator.state.deepspeed_plugin.deepspeed_config)
        ranks.raise_together(self.failure)


def environment(accelerator: Accelerator, *, engine: str) -> dict[str, Any]:
    """Return what a bug report needs: versions, commit, device, world size, engine."""
    device = accelerator.device
    return software() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": accelerator.num_processes,
        "engine": engine,
        "mixed_precision": accelerator.mixed_precision,
    }


def refuse_used(path: Path, *, resume: str, config_yaml: str) -> None:
    """Refuse a folder that cannot be this run's; nothing is created.

    Raises:
        ConfigError: it holds something else, or is not a folder.
    """
    if not path.exists():
        return
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise ConfigError(_no_folder(path, error)) from error
    held = sorted(name for name in names if not name.startswith(".") and not name.endswith(TEMPORARY))
    resumes = resume != "none"
    if resumes and "summary.json" in held:
        raise ConfigError(
            f"train.output_dir: {path} holds a run that has finished; nothing was changed there. Name a new "
            "folder for another"
        )
    if not held or (resumes and (find_checkpoints(path) or _is_same_run(path, config_yaml))):
        return
    what = "another run already" if OF_A_RUN & {*held} else "other files"
    some = f"{', '.join(held[:3])}{', ...' if held[3:] else ''}"
    problem = f"train.output_dir: {path} holds {what} ({some}); nothing was changed there. Name a new folder"
    unfinished = [each.name for each in find_checkpoints(path, complete=False)] if resumes else ()
    if unfinished:
        some = ", ".join(unfinished)
        problem += f". No checkpoint there can be resumed from: {some} never got the mark COMPLETE"
    raise ConfigError(problem)


def resume_from(path: Path, *, resume: str, config_yaml: str) -> str:
    """Return what a run resumes from: what is set, or ``auto`` if that was only where this run started."""
    starts = resume not in ("auto", "none") and Path(resume).absolute().parent != path.absolute()
    return "auto" if starts and _is_same_run(path, config_yaml) and find_checkpoints(path) else resume


def _is_same_run(path: Path, config_yaml: str) -> bool:
    """Whether a run with the same configuration has started in a folder."""
    with suppress(OSError):
        return (path / "config.yaml").read_text(encoding="utf-8") == config_yaml
    return False


def _claim(path: Path, *, resume: str, config_yaml: str) -> IO[bytes] | None:
    """Make the folder, and lock it if it is this run's."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(_no_folder(path, error)) from error
    # Checked before, so that no lock is put into someone else's folder, and after: its holder may have ended.
    refuse_used(path, resume=resume, config_yaml=config_yaml)
    lock = _lock(path)
    refuse_used(path, resume=resume, config_yaml=config_yaml)
    return lock


def _lock(path: Path) -> IO[bytes] | None:
    """Keep two processes out of one folder; the lock ends with the process, however it ends."""
    os.close(os.open(path / LOCK, os.O_RDONLY | os.O_CREAT, 0o644))
    # For reading if possible: a file system with a file open for writing cannot be remounted read-only. NFS locks
    # only what is open for writing.
    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            return _locked(path, mode)
        except OSError as error:
            problem = error.strerror
    logger.warning("%s has no lock (%s): another run may write to it too", path, problem)
    return None


def _locked(path: Path, mode: int) -> IO[bytes]:
    """Open a folder's lock and take it, waiting for its holder at most `LOCK_PATIENCE_S`."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    with ExitStack() as on_failure:
        file = on_failure.enter_context(os.fdopen(os.open(path / LOCK, mode | os.O_CLOEXEC), "rb"))
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"train.output_dir: another process is writing to {path}; wait for it, or name another "
                        f"folder. If its machine is gone, delete {path / LOCK}"
                    ) from error
                time.sleep(0.1)
            else:
                on_failure.pop_all()
                return file


def _no_folder(path: Path, error: OSError) -> str:
    return f"train.output_dir: {path} cannot be made a folder ({error.strerror}); name another"


def _plain(value: Any) -> Any:
    """Return ``value`` with tensors and numpy numbers as Python numbers, and numbers that JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    return value
