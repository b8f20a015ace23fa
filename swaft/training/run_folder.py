"""The folder of a run: what was run, with what, and what came out."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from swaft.errors import ConfigError

PACKAGES = (
    "swaft",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "safetensors",
    "peft",
    "numpy",
)


LAUNCHERS = {"launch", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
"""Words by which the command line of a process that starts ranks is known."""


class RunFolder:
    """A folder that belongs to one run; only the main process writes to it.

    Use `RunFolder.create`; the attributes are plain paths, readable on every rank.
    """

    def __init__(self, path: Path, *, is_main: bool):
        self.path = path
        self.is_main = is_main

    @classmethod
    def create(cls, path: str | os.PathLike[str], accelerator: Accelerator) -> RunFolder:
        """Claim ``path`` for this run (collective).

        The main process alone looks and creates, and tells the others, so no rank sees what another just
        made.

        Raises:
            ConfigError: on every rank, where the folder holds files already or cannot be made.
        """
        problem = [_claim(Path(path)) if accelerator.is_main_process else None]
        broadcast_object_list(problem)
        if problem[0]:
            raise ConfigError(problem[0])
        return cls(Path(path), is_main=accelerator.is_main_process)

    @property
    def final(self) -> Path:
        """Hugging Face folder of the last weights."""
        return self.path / "final"

    @property
    def final_averaged(self) -> Path:
        """Hugging Face folder of the averaged weights."""
        return self.path / "final-averaged"

    @property
    def best(self) -> Path:
        """Hugging Face folder of the weights that scored best on validation rows, where they are kept."""
        return self.path / "best"

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        if not self.is_main:
            return
        unfinished = self.path / f".{name}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all; infinite numbers become text, as JSON has none."""
        self.write_text(name, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

    def write_provenance(self, config_yaml: str, accelerator: Accelerator, *, engine: str) -> None:
        """Write what runs: config.yaml, command.txt, env.json, and ds_config.json under DeepSpeed.

        Args:
            config_yaml: the resolved configuration.
            accelerator: after ``prepare``, when accelerate has filled the rest of the DeepSpeed
                configuration.
            engine: name of the training engine.
        """
        self.write_text("config.yaml", config_yaml)
        self.write_text("command.txt", shlex.join(launch_command()) + "\n")
        self.write_json("env.json", environment(accelerator, engine=engine))
        if accelerator.state.deepspeed_plugin is not None:
            self.write_json("ds_config.json", accelerator.state.deepspeed_plugin.deepspeed_config)


def launch_command() -> list[str]:
    """The command that started this run: that of the launcher where one started the ranks, else this process's."""
    started_by = [_command_line(parent) for parent in psutil.Process().parents()]
    launchers = [words for words in started_by if LAUNCHERS & _names(words)]
    return launchers[-1] if launchers else sys.orig_argv


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or belongs to somebody else
        return []


def _names(words: list[str]) -> set[str]:
    return {Path(word).name for word in words[:4]}


def environment(accelerator: Accelerator, *, engine: str) -> dict[str, Any]:
    """Return what a bug report needs: versions, commit, device, world size, engine."""
    device = accelerator.device
    return software() | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "world_size": accelerator.num_processes,
        "engine": engine,
        "mixed_precision": accelerator.mixed_precision,
    }


def software() -> dict[str, Any]:
    """Return what runs: versions, operating system, commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git_commit": _git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages a figure or a bug depends on, those that are installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def refuse_used(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be a new run's; nothing is made.

    Raises:
        ConfigError: where it holds files already, or is none.
    """
    problem = _held(Path(path)) if Path(path).exists() else None
    if problem:
        raise ConfigError(problem)


def _claim(path: Path) -> str | None:
    """Make the folder; return what is wrong where it cannot be this run's."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _no_folder(path, error)
    return _held(path)


def _no_folder(path: Path, error: OSError) -> str:
    return f"train.output_dir: {path} cannot be made a folder ({error.strerror}); name another"


def _held(path: Path) -> str | None:
    """What is wrong with a folder that is there: that it holds files, or is none."""
    try:
        held = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        return _no_folder(path, error)
    if held:
        return (
            f"train.output_dir: {path} holds another run already "
            f"({', '.join(held[:3])}{', ...' if held[3:] else ''}); nothing was changed there. Name a new "
            "folder, or delete that one"
        )
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree swaft runs from, None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """``value`` with tensors and numpy numbers as Python numbers, and numbers that JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    return value
