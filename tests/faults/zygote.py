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
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import deepspeed  # noqa: F401
from events import arrange
from launching import ROOT, load_recipe
from rehearsal import rehearse
from spy import look_on

import swaft.averaging.host  # noqa: F401  (compiles, or loads what was compiled)
from swaft.training.launch.deepspeed_extension import use_environment
from swaft.training.launch.launcher import read_launch

PATIENCE_S = 90.0
"""Seconds after the end of one rank, after which the others are ended too, as a launcher does."""


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
            that is called at that moment, and nobody is killed. With ``spy`` ranks write what they do (`look_on`).
            With ``group`` all processes of a rank are sent the signal. ``events``: each the ``ranks`` that it
            befalls and arguments of `arrange`. ``rehearse``: arguments of that function, for all ranks.
    """
    words = [
        "--config_file",
        str(ROOT / "launch" / "accelerate" / order["launch"]),
        "recipes/classification.py",
    ]
    environ = read_launch(words).environ
    if order["ranks"] > 1:  # to one process a launcher says nothing
        environ |= {
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
                    send = os.killpg if order.get("group") else os.kill
                    send(process, order.get("signal", signal.SIGKILL))
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
        os.environ.update(environ)
        if order["ranks"] > 1:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if rank in order.get("victims", ()) and order.get("at_disk_call") is not None:
            arrange("kill", folder=order["folder"], at_disk_calls=[order["at_disk_call"]])
        for event in order.get("events", ()):
            if rank in event["ranks"]:
                arrange(folder=order["folder"], **{name: event[name] for name in event if name != "ranks"})
        if "rehearse" in order:
            rehearse(**order["rehearse"])
        if "spy" in order:
            look_on(order, rank)
        os._exit(recipe.main(order["arguments"]))
    except BaseException:
        traceback.print_exc()
    os._exit(70)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
