"""The command line that all benchmarks share: measure sections, write one JSON, print a table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.deadline import within
from benchmarks.environment import environment

RESULTS = Path(__file__).parent / "results"


class Section(Protocol):
    """A module that measures one part of a benchmark."""

    def measure(self, *, quick: bool, device: str) -> dict[str, object]:
        """The figures; ``quick`` runs every path on tiny sizes and measures nothing."""
        ...

    def rows(self, result: dict) -> list[Sequence[object]]:
        """One line per figure, for people."""
        ...


def run(
    name: str,
    sections: Mapping[str, Section],
    arguments: Sequence[str] | None,
    *,
    about: str,
    head: Mapping[str, object] | None = None,
) -> None:
    """Measure what the command line asks for, write the JSON, print the table.

    Args:
        name: of the results file, ``results/<name>.json`` or ``results/<name>_<GPU>.json``.
        sections: the parts, in order.
        arguments: the command line, None for the process's own.
        about: its first line is that of ``--help``.
        head: what the file says besides machine and versions.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--section", choices=sections, action="append", help="only this part; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: the one of this device in results/")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out or (None if options.quick else RESULTS / f"{_file_name(name)}.json")
    results: dict[str, object] = {"environment": environment(), **(head or {}), "quick": options.quick}
    if options.section and path is not None and path.exists():
        results = _merged_into(json.loads(path.read_text()), results)
    for part in options.section or sections:
        begun = time.perf_counter()
        found = within(
            part, 0.0, lambda part=part: sections[part].measure(quick=options.quick, device=device)
        )
        seconds = time.perf_counter() - begun
        results[part] = {"seconds to measure": round(seconds, 1), **found}
        print(f"\n{part} ({seconds:.0f} s)")
        print_table([("skipped", found["skipped"])] if "skipped" in found else sections[part].rows(found))
        if path is not None:  # part by part: if a later one fails, nothing is lost
            path.write_text(json.dumps(results, indent=1) + "\n")


def print_table(lines: Iterable[Sequence[object]]) -> None:
    """Print lines of a table, whose first column is the widest."""
    for first, *rest in lines:
        print(f"  {first:<76}", *(f"{column!s:<34}" for column in rest))


def _merged_into(old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """The old results, to be overwritten part by part: only if both come from one machine and its versions."""
    for key in new:
        if old.get(key) != new[key]:
            raise SystemExit(
                f"the results on file have {key} {old.get(key)}, and this run has {new[key]}; expected the same: "
                "measure all sections again"
            )
    return old


def _file_name(name: str) -> str:
    return f"{name}_{torch.cuda.get_device_name().replace(' ', '_')}" if torch.cuda.is_available() else name
