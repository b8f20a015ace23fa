"""Runs that are killed, again and again, and come to the end that an unbroken run comes to: seeded, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_KILLS = 3
"""Times that one run is killed at most, before it is let go."""
TIMINGS = {"seconds", "tokens_per_second"}
SETTINGS = (
    "train.max_steps=24",
    "train.save_steps=4",
    "train.logging_steps=3",
    "train.num_train_epochs=6",
    "train.ddp_timeout=30",  # torch waits for a first rank that is gone twice as long, and less than `zygote` does
    "eval.eval_steps=6",
    "noise.kind=r3f",
    "averaging.rule=swa",
    "averaging.start=0.3",
    "eval.keep_best=either",
)


@dataclass(frozen=True)
class Engine:
    """One way to train."""

    launch: str
    """File of launch/accelerate."""
    ranks: int


ENGINES = {
    "ddp": Engine("ddp_cpu.yaml", 2),
    "ddp3": Engine("ddp_cpu.yaml", 3),
    "zero2": Engine("zero2_cpu.yaml", 2),
    "zero3": Engine("zero3_cpu.yaml", 2),
    "fsdp2": Engine("fsdp2_cpu.yaml", 2),
    "plain": Engine("single.yaml", 1),
}


@dataclass(frozen=True)
class Ending:
    """What a run leaves, but for times."""

    weights: dict[str, bytes]
    """Of every folder, the bytes of the weights' file."""
    metrics: list[dict[str, Any]]
    scores: dict[str, Any]


class Zygote:
    """A process that starts ranks without importing anything anew."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            cwd=HERE.parents[1],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "recipes"), str(HERE.parents[1])])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def run(self, engine: Engine, folder: Path, inputs: Path, *settings: str, **kill: Any) -> dict[str, Any]:
        """Start a run in a folder, or the rest of it, and wait until all its ranks have ended."""
        order = {
            "launch": engine.launch,
            "ranks": engine.ranks,
            "log": str(folder.with_suffix(".log")),
            "folder": str(folder),
            "arguments": [
                "--config",
                str(inputs / "run.yaml"),
                f"train.output_dir={folder}",
                *SETTINGS,
                *settings,
            ],
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order | kill) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A `Zygote` for the time of a context."""
    started = Zygote()
    try:
        yield started
    finally:
        started.close()


def ending(folder: Path) -> Ending:
    """Read what a finished run has left."""
    weights = {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/model.safetensors"))}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return Ending(weights, metrics, {"scores": summary["scores"], "best": summary["best"]})


def differences(found: Ending, expected: Ending) -> list[str]:
    """What differs between two endings, in words."""
    names = {*found.weights, *expected.weights}
    different = [
        f"{name}/" for name in sorted(names) if found.weights.get(name) != expected.weights.get(name)
    ]
    if found.metrics != expected.metrics:
        different.append("metrics.jsonl")
    if found.scores != expected.scores:
        different.append("summary.json")
    return different


def broken_run(
    zygote: Zygote,
    engine: Engine,
    folder: Path,
    inputs: Path,
    reference: Ending,
    *,
    seed: int,
    usual_s: float,
    disk_calls: int = 160,
) -> dict[str, Any]:
    """Kill a run at random, start it again until it ends, and compare it with an unbroken one.

    Args:
        zygote: starts the ranks.
        engine: of the run.
        folder: of the run; deleted where all was right.
        inputs: model, data and configuration.
        reference: of the unbroken run.
        seed: of this run's faults.
        usual_s: seconds that an unbroken run takes.
        disk_calls: about how often a rank touches the disk in a run.

    Returns:
        What was done and found: ``kills``, ``attempts`` and ``differences``, none of which there should be.
    """
    draw = random.Random(seed)
    kills, attempts = [], []
    for _ in range(draw.randint(1, MOST_KILLS)):
        everyone = list(range(engine.ranks))
        victims = everyone if draw.random() < 0.5 else [draw.choice(everyone)]
        where = {"at_disk_call": draw.randint(1, disk_calls)}
        if draw.random() < 0.5:
            where = {"after_s": round(draw.uniform(0.05, 1.0) * usual_s, 2)}
        kills.append({"victims": victims, **where})
        attempts.append(zygote.run(engine, folder, inputs, **kills[-1]))
        if (folder / "summary.json").exists():
            break
    while not (folder / "summary.json").exists() and len(attempts) <= MOST_KILLS + 1:
        attempts.append(zygote.run(engine, folder, inputs))
    found = ["did not come to its end"]
    if (folder / "summary.json").exists():
        found = differences(ending(folder), reference)
    if not found:
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink()
    return {"seed": seed, "kills": kills, "attempts": attempts, "differences": found}
