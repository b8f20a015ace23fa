"""Starts real ranks over gloo, with a hard time limit, and brings their findings home.

Imports take most of the time of such a test, so ranks are started once and check much. A worker is a script
that calls :func:`worker_main` with its cases; every case yields named checks; the test reads one result a check.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

Case = Callable[[], Iterator[tuple[str, Callable[[], None]]]]
"""Yields (name of a check, the check) on every rank alike; a check raises where it finds a fault."""


def start_ranks(
    script: Path, results: Path, *, ranks: int = 2, timeout_s: float = 280, cases: Sequence[str] = ()
) -> dict[str, str]:
    """Run a worker script on ``ranks`` processes; returns the findings by check ("" where it held).

    Args:
        script: calls :func:`worker_main`.
        results: file for the findings.
        ranks: number of processes.
        timeout_s: seconds after which the ranks are stopped, and the test has failed.
        cases: names of the worker's cases to run; by default all.
    """
    returncode, output = run_ranks([script, results, *cases], ranks=ranks, timeout_s=timeout_s)
    if returncode:
        pytest.fail(f"{script.name} ended with {returncode}:\n{output[-6000:]}")
    return json.loads(results.read_text())


def faults(findings: dict[str, str], case: str, *, checks: int) -> str:
    """What was found wrong in a case, "" where nothing was and at least so many checks were made."""
    made = {name: fault for name, fault in findings.items() if name.startswith(f"{case}: ")}
    if len(made) < checks:
        return f"{case}: only {len(made)} checks were made, expected {checks}\n"
    return "".join(f"{name}\n{fault}\n" for name, fault in made.items() if fault)


def run_ranks(arguments: Sequence[str | Path], *, ranks: int = 2, timeout_s: float = 280) -> tuple[int, str]:
    """Run a script on ``ranks`` processes; (exit code, output). A run past its time is a failed test."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
        *map(str, arguments),
    ]  # fmt: skip
    with suppress(ModuleNotFoundError):  # what recipes need; without it DeepSpeed builds where torch says
        from swaft.training.launch.deepspeed_extension import use_environment

        use_environment()
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        ranks_running = psutil.Process(process.pid).children(recursive=True)
        for each in ranks_running:
            each.send_signal(signal.SIGABRT)  # faulthandler prints where each rank stands
        psutil.wait_procs(ranks_running, timeout=10)
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"{Path(arguments[0]).name} did not end within {timeout_s:.0f} s:\n{output[-6000:]}")
    return process.returncode, output


def worker_main(cases: dict[str, Case]) -> None:
    """Run every check of every case on this rank and write rank 0's view of all ranks' findings."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    findings: dict[str, str] = {}
    for case_name in sys.argv[2:] or cases:
        for check_name, check in cases[case_name]():
            print(f"rank {dist.get_rank()}: {case_name}: {check_name}", flush=True)  # where a hang happened
            found: list[str | None] = [None] * dist.get_world_size()
            try:
                check()
                mine = ""
            except Exception:
                mine = f"rank {dist.get_rank()}: {traceback.format_exc(limit=-4)}"
                print(mine, flush=True)  # the other ranks may now wait for this one until the time is up
            dist.all_gather_object(found, mine)
            findings[f"{case_name}: {check_name}"] = "\n".join(each for each in found if each)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(findings))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # Python's own tear-down aborts where one of gloo's threads lets go of a tensor meanwhile
