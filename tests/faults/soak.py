"""Kills many runs, one after the other, and holds each to the bits of an unbroken one; appends to one log.

    make soak                        200 runs over ZeRO-2, ZeRO-3 and DDP, about an hour on 2 cores
    python tests/faults/soak.py --runs 1000 --seed 7 --log soak.jsonl

The log is runs/soak.jsonl. If it exists, it is continued, since a run's faults are a function of the seed and its
number; remove it after a change of the code. The folder of a run that came to another end is kept. Exit code: 0
where all came to the same end, and no rank had to be ended because it waited longer than train.ddp_timeout for one
that was killed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "recipes")]

from fault_inputs import save_inputs  # noqa: E402
from faults import ENGINES, Ending, broken_run, ending, zygote  # noqa: E402

from benchmarks.environment import environment  # noqa: E402

KILLED = ("zero2", "zero3", "ddp")


def main() -> int:
    """Kill what is still to be killed; tell how many runs came to the same end."""
    options = parse()
    log = options.log
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        append(log, {"seed": options.seed, "environment": environment()})
    records = [json.loads(line) for line in log.read_text().splitlines()]
    seed, done = records[0]["seed"], len(records) - 1
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    (folder / "inputs").mkdir()
    inputs = save_inputs(folder / "inputs")
    unbroken: dict[str, tuple[Ending, float]] = {}
    with zygote() as started:
        for number in range(done, options.runs):
            name = KILLED[number % len(KILLED)]
            if name not in unbroken:
                run = folder / f"unbroken-{name}"
                found = started.run(ENGINES[name], run, inputs)
                if set(found["codes"]) != {0}:
                    sys.exit(f"an unbroken run under {name} failed; see {run.with_suffix('.log')}")
                unbroken[name] = ending(run), found["seconds"]
            reference, usual_s = unbroken[name]
            record = broken_run(
                started,
                ENGINES[name],
                folder / f"{number:04d}-{name}",
                inputs,
                reference,
                seed=seed * 1_000_000 + number,
                usual_s=usual_s,
            )
            records.append({"run": number, "engine": name, **record})
            append(log, records[-1])
            print(number, name, record["kills"], record["differences"] or "same", flush=True)
    return tell(records[1:], folder)


def tell(records: list[dict], folder: Path) -> int:
    """Print the count; returns the exit code."""
    wrong = [record for record in records if record["differences"]]
    hung = sum(attempt["hung"] for record in records for attempt in record["attempts"])
    kills = sum(len(record["kills"]) for record in records)
    print(
        f"{len(records) - len(wrong)} of {len(records)} runs came to the same end after {kills} kills; {hung} hung"
    )
    if wrong:
        print(f"others: {', '.join(str(record['run']) for record in wrong)}, kept in {folder}")
    return int(bool(wrong or hung))


def append(log: Path, record: dict) -> None:
    """Add one line."""
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="runs in all")
    parser.add_argument("--seed", type=int, default=1, help="of all faults; the log's own where there is one")
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / "soak.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
