"""Starts ranks of a benchmark on this machine, with a hard time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, *arguments: str, ranks: int, threads: int, timeout_s: float) -> None:
    """Run a module on every rank, over gloo on the CPU.

    Args:
        module: as of ``python -m``.
        arguments: its arguments.
        ranks: how many processes.
        threads: torch's threads in each.
        timeout_s: seconds after which all of them are killed.

    Raises:
        RuntimeError: it failed or took too long; the message has the end of its output.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
        "-m", module, *arguments,
    ]  # fmt: skip
    with suppress(ModuleNotFoundError):  # needs the recipes' packages; else torch's folder is used
        from swaft.training.launch.deepspeed_extension import use_environment

        use_environment()
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        fault = f"ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
        process.kill()
        output, _ = process.communicate()
        fault = f"did not end within {timeout_s:.0f} s"
    if fault:
        raise RuntimeError(f"{module} on {ranks} ranks {fault}:\n{output[-6000:]}")
