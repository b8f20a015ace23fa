"""Stands in for `srun`, `scontrol`, `scancel`, `accelerate` and `python`, and records what each was told.

Called as ``stand_ins.py NAME ARGUMENTS...``; one JSON line a call is appended to the file $RECORD.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

TOLD = (
    "PET_",
    "SLURM_",
    "SRUN_",
    "HF_",
    "TORCH_ELASTIC_",
    "TRITON_",
    "TORCH_EXTENSIONS_",
    "TOKENIZERS_",
    "PYTHONFAULT",
)


def main(name: str, words: list[str]) -> int:
    record(name, words)
    if name == "srun":
        return srun(words)
    if name == "scontrol" and words[:2] == ["show", "hostnames"]:
        print("\n".join(os.environ["NODES"].split()))
    if name == "scancel":
        os.kill(int(recorded("srun")[0]["pid"]), signal.SIGUSR2)
    if name in ("accelerate", "python"):
        return int(os.environ.get(f"{name.upper()}_CODE_{os.environ.get('SLURM_NODEID', '0')}", "0"))
    return 0


def srun(words: list[str]) -> int:
    """Run the task of every node, one after the other; with $STEP_RUNS end only when told to, with that code."""
    asked = []
    signal.signal(signal.SIGUSR2, lambda *_: asked.append(True))
    task = words[next(index for index, word in enumerate(words) if not word.startswith("--")) :]
    nodes = int(os.environ["SLURM_NNODES"])
    codes = [
        subprocess.run(task, env=os.environ | {"SLURM_NODEID": str(node)}).returncode for node in range(nodes)
    ]
    while "STEP_RUNS" in os.environ:
        if asked:
            return int(os.environ["STEP_RUNS"])
        time.sleep(0.02)
    return max(codes)


def record(name: str, words: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key.startswith(TOLD)}
    ignored = [
        each.name for each in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(each) is signal.SIG_IGN
    ]
    line = {
        "name": name,
        "words": words,
        "pid": os.getpid(),
        "environment": environment,
        "ignores": ignored,
    }
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(line) + "\n")


def recorded(name: str) -> list[dict]:
    with open(os.environ["RECORD"]) as file:
        return [call for call in map(json.loads, file) if call["name"] == name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
