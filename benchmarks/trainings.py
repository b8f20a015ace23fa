"""Runs a recipe as a user starts it, once for each seed and arm of a table; what has finished is not run again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train_once(folder: Path, recipe: str, config: str, overrides: Sequence[str]) -> None:
    """Train in one process and one thread, unless there is a finished run.

    Args:
        folder: run folder; the screen's output goes into log.txt there, once the run is over.
        recipe: name of the script in recipes/, such as ``seq2seq``.
        config: path of the YAML file below recipes/configs/.
        overrides: settings as ``section.name=value``.
    """
    if (folder / "summary.json").exists():
        return
    if folder.exists():  # an unfinished run, which does not count
        folder.rename(folder.with_name(f"{folder.name}.broken-off-{time.time_ns()}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", "launch/accelerate/single.yaml", "--num_cpu_threads_per_process", "1",
        f"recipes/{recipe}.py", "--config", f"recipes/configs/{config}",
        *overrides, f"train.output_dir={folder}",
    ]  # fmt: skip
    print(folder.name, flush=True)
    log = folder.with_suffix(".log")
    with log.open("w") as screen:
        subprocess.run(command, cwd=ROOT, check=True, stdout=screen)
    log.rename(folder / "log.txt")
