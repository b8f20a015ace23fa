"""Starts ranks of a recipe by forking: all imports are done once, so a run of seconds is a run of seconds.

    PYTHONPATH=tests/recipes python tests/faults/zygote.py

reads one order a line from standard input, as JSON, and answers likewise.

Everything a rank does after the fork is what it does under `accelerate launch`; only the launcher is missing. A
rank may be told to end itself with SIGKILL, at a moment or at the n-th time that it touches the disk.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import deepspeed  # noqa: F401
from launching import ROOT, load_recipe

import swaft.averaging.host  # noqa: F401  (compiles, or loads what was compiled)
from swaft.training.deepspeed_extension import use_environment
from swaft.training.launcher import read_launch

PATIENCE_S = 60.0
"""Seconds after the end of one rank, after which the others are ended too, as a launcher does."""
DISK = ("fsync", "replace", "unlink", "rmdir")
"""Calls by which a checkpoint comes to be, or goes."""


def main() -> None:
    """Serve orders until there are no more."""
    use_environment()
    recipe = load_recipe("classification")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(recipe, json.loads(line))) + "\n")
        sys.stdout.flush()


def run(recipe: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of one run, kill what is to be killed, and wait for all of them.

    Args:
        recipe: module of the recipe.
        order: ``launch`` (a file of launch/accelerate), ``ranks``, ``arguments``, ``log`` (a file), and where a
            rank is to be killed ``victims`` (their numbers) with ``after_s``, ``at_log`` (a text that appears
            there) or ``at_disk_call``; ``signal`` (default SIGKILL; not with ``at_disk_call``). With ``command``
            that is called at that moment, and nobody is killed.
    """
    words = [
        "--config_file",
        str(ROOT / "launch" / "accelerate" / order["launch"]),
        "recipes/classification.py",
    ]
    environ = read_launch(words).environ | {
        "WORLD_SIZE": str(order["ranks"]),
        "LOCAL_WORLD_SIZE": str(order["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    began = time.monotonic()
    ranks = {fork(recipe, order, environ, rank): rank for rank in range(order["ranks"])}
    deadline, codes = None, {}
    signalled = not {"after_s", "at_log"} & order.keys()
    while len(codes) < len(ranks):
        now = time.monotonic()
        if not signalled and is_time(order, now - began):
            signalled = True
            if "command" in order:
                subprocess.run(order["command"], check=True)
            for process, rank in ranks.items():
                if rank in order.get("victims", ()) and process not in codes:
                    os.kill(process, order.get("signal", signal.SIGKILL))
        for process in ranks:
            if process not in codes and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(ended[1])
                deadline = deadline or now + PATIENCE_S
        if deadline and now > deadline:
            for process in ranks.keys() - codes.keys():
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return {
        "codes": [codes[process] for process in ranks],
        "seconds": round(time.monotonic() - began, 2),
        "hung": bool(deadline and time.monotonic() > deadline),
    }


def is_time(order: dict[str, Any], seconds: float) -> bool:
    """Whether the moment has come at which a rank is to be sent its signal."""
    if "after_s" in order:
        return seconds >= order["after_s"]
    log = Path(order["log"])
    return log.exists() and order["at_log"] in log.read_text()


def fork(recipe: Any, order: dict[str, Any], environ: dict[str, str], rank: int) -> int:
    """Start one rank; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        os.environ.clear()
        os.environ.update(environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if rank in order.get("victims", ()) and order.get("at_disk_call") is not None:
            die_at(order["at_disk_call"], order["folder"])
        os._exit(recipe.main(order["arguments"]))
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def die_at(number: int, folder: str) -> None:
    """End this process with SIGKILL just before the n-th call that touches the disk under a folder."""
    count, lock = 0, threading.Lock()

    def counted(call: Any) -> Any:
        def before(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += touches(arguments[0], folder)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return before

    for name in DISK:
        setattr(os, name, counted(getattr(os, name)))


def touches(target: Any, folder: str) -> bool:
    """Whether a path, or what an open file is called, lies in a folder."""
    if isinstance(target, int):
        try:
            target = os.readlink(f"/proc/self/fd/{target}")
        except OSError:
            return False
    return os.fspath(target).startswith(folder)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
