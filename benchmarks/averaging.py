"""What weight averaging costs and how exact it is, beside what others do, side by side in one run.

    python -m benchmarks.averaging                       # about 6 minutes on 2 quiet cores
    python -m benchmarks.averaging --section arithmetic  # one part again, put into the file of the last run
    python -m benchmarks.averaging --quick               # every path on tiny sizes; writes nothing without --out

Parts: ``arithmetic`` (rate of one update against ``a += b``), ``error`` (100,000 updates against float64),
``event`` (seconds, bytes and collectives of an averaging event, and the steps of training with it and without; on
a GPU its copy too) and ``memory``. Writes benchmarks/results/averaging.json, or averaging_<GPU>.json, and prints a
table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import averaging_arithmetic, averaging_error, averaging_event, averaging_gpu, averaging_memory
from benchmarks.environment import environment

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("arithmetic", "error", "event", "memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--section", choices=SECTIONS, action="append", help="only this part; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: the one of this device in results/")
    options = parser.parse_args(arguments)
    path = options.out or (None if options.quick else RESULTS / f"{result_name()}.json")
    results: dict[str, object] = {"environment": environment(), "quick": options.quick}
    if options.section and path is not None and path.exists():
        results = merged_into(json.loads(path.read_text()), results)
    for name in options.section or SECTIONS:
        begun = time.perf_counter()
        found = measure(name, quick=options.quick)
        results[name] = {"seconds to measure": round(time.perf_counter() - begun, 1), **found}
        print(f"\n{name} ({time.perf_counter() - begun:.0f} s)")
        print_table(name, found)
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str, *, quick: bool) -> dict[str, object]:
    """The figures of one part."""
    on_gpu = torch.cuda.is_available()
    if name == "arithmetic":
        return averaging_arithmetic.measure(quick=quick)
    if name == "error":
        return averaging_error.measure(quick=quick)
    if name == "event":
        return (averaging_gpu if on_gpu else averaging_event).measure(quick=quick)
    return averaging_memory.measure(quick=quick, device="cuda" if on_gpu else "cpu")


def print_table(name: str, found: dict[str, object]) -> None:
    """One line a figure."""
    part = {
        "arithmetic": averaging_arithmetic,
        "error": averaging_error,
        "event": averaging_gpu if "by configuration" in found else averaging_event,
        "memory": averaging_memory,
    }[name]
    for first, *rest in part.rows(found):
        print(f"  {first:<62}", *(f"{column!s:<34}" for column in rest))


def merged_into(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """The old results, to be written over part by part: only where both come from one machine and its versions."""
    for key in new:
        if old.get(key) != new[key]:
            raise SystemExit(
                f"the results on file have {key} {old.get(key)}, and this run has {new[key]}; expected the same: "
                "measure all sections again"
            )
    return old


def result_name() -> str:
    """Name of this device's results."""
    if not torch.cuda.is_available():
        return "averaging"
    return "averaging_" + torch.cuda.get_device_name().replace(" ", "_")


if __name__ == "__main__":
    main()
