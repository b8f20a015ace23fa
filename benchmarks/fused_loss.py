"""What the fused noise-stability loss costs and how exact it is, beside other ways to it, side by side in one run.

    python -m benchmarks.fused_loss                      # at most 6 minutes on 2 quiet cores, 4 on a GPU
    python -m benchmarks.fused_loss --section error      # one part again, put into the file of the last run
    python -m benchmarks.fused_loss --quick              # every path on tiny sizes; writes nothing without --out

Parts: ``speed`` (forward and backward by shape, beside the plain loss and the bare GEMMs; on a GPU beside Liger
too), ``memory`` (peaks), ``error`` (against float64, by size of noise), ``chunks`` (what chunk_bytes changes) and
``training_step`` (a T5 under R3F against a plain step). Writes benchmarks/results/fused_loss.json, or
fused_loss_<GPU>.json, and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import (
    fused_loss_chunks,
    fused_loss_error,
    fused_loss_memory,
    fused_loss_rivals,
    fused_loss_speed,
    fused_loss_training_step,
)
from benchmarks.averaging import merged_into
from benchmarks.environment import environment

RESULTS = Path(__file__).parent / "results"
SECTIONS = {
    "speed": fused_loss_speed,
    "memory": fused_loss_memory,
    "error": fused_loss_error,
    "chunks": fused_loss_chunks,
    "training_step": fused_loss_training_step,
}
RIVALS = ("liger-kernel", "triton")
"""Packages whose versions matter here beside those of every figure."""


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out or (None if options.quick else RESULTS / f"{result_name()}.json")
    results: dict[str, object] = {
        "environment": environment(),
        "rivals": rival_versions(),
        "arms": fused_loss_rivals.ABOUT,
        "quick": options.quick,
    }
    if options.section and path is not None and path.exists():
        results = merged_into(json.loads(path.read_text()), results)
    for name in options.section or SECTIONS:
        begun = time.perf_counter()
        found = SECTIONS[name].measure(quick=options.quick, device=device)
        results[name] = {"seconds to measure": round(time.perf_counter() - begun, 1), **found}
        print(f"\n{name} ({time.perf_counter() - begun:.0f} s)")
        for first, *rest in SECTIONS[name].rows(found):
            print(f"  {first:<76}", *(f"{column!s:<30}" for column in rest))
        if path is not None:  # part by part: a later one that fails takes nothing with it
            path.write_text(json.dumps(results, indent=1) + "\n")


def rival_versions() -> dict[str, str | None]:
    """Versions of the packages that are compared with; None: not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in RIVALS}


def result_name() -> str:
    """Name of this device's results."""
    if not torch.cuda.is_available():
        return "fused_loss"
    return "fused_loss_" + torch.cuda.get_device_name().replace(" ", "_")


if __name__ == "__main__":
    main()
