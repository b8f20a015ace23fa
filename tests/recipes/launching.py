"""Starts a recipe as a user does, through `accelerate launch`, with a hard time limit; or gives it as a module."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@dataclass(frozen=True)
class Finished:
    """What a launch left."""

    code: int
    out: str
    err: str


def launch(config_file: str, recipe: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> Finished:
    """Run `accelerate launch` to its end; over the time limit all its ranks are killed and the test fails."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(ROOT / "launch" / "accelerate" / config_file),
        "--main_process_port",
        "0",
        recipe,
        *arguments,
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout_s:.0f} s\n{out}\n{err}") from None
    return Finished(process.returncode, out, err)


def launch_several(
    config_file: str, runs: list[Any], folder: Path, *, timeout_s: float = TIMEOUT_S
) -> Finished:
    """Launch `several_runs.py` with these runs to a good end; their list is kept in the folder."""
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(Path(__file__).with_name("several_runs.py"))
    finished = launch(config_file, script, str(folder / "runs.json"), timeout_s=timeout_s)
    assert finished.code == 0, finished.err[-4000:]
    return finished


def launch_alike(config_files: Sequence[str], recipe: str, config: Path, folder: Path) -> dict[str, Path]:
    """The same run by each launch file, with as many rows in a step on one rank as on two; returns its folders."""
    outputs = {file: folder / file for file in config_files}
    for file, output in outputs.items():
        batch = 16 if file == "single.yaml" else 8
        finished = launch(
            file,
            f"recipes/{recipe}.py",
            *("--config", str(config)),
            f"train.output_dir={output}",
            f"train.per_device_train_batch_size={batch}",
        )
        assert finished.code == 0, finished.err
        assert re.search(r"step (\d+)/\1 \| loss ", finished.out)
    return outputs


def forget_accelerate() -> None:
    """Let accelerate start in this process as if nothing had before: it keeps its state in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load_recipe(name: str) -> ModuleType:
    """The script of that name in recipes/, to call its `main` in this process."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
