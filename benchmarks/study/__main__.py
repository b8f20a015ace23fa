"""Command line of the study.

nice -n 19 python -m benchmarks.study run       # start or continue the grid; stop it at any time
python -m benchmarks.study run --jobs 12        # that many processes in parallel, on one GPU or many cores
SWAFT_STUDY_PRECISION=fp32 python -m benchmarks.study run   # passes in fp32, for processors that are slow in bf16
python -m benchmarks.study pack FOLDER          # model and tasks for a machine that has neither; run there:
SWAFT_STUDY_PACK=FOLDER SWAFT_STUDY=ROWS python -m benchmarks.study run --jobs 14 --seconds 460 --file card
python -m benchmarks.study cost                 # measured seconds per cell, task by task
python -m benchmarks.study cell NAME [--check]  # run one cell again, and compare it with its rows
python -m benchmarks.study status               # how many cells of each phase are done
python -m benchmarks.study evidence             # generate docs/evidence.md, and update what other pages quote
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.study.cell import Cell, identity, parse_cell, run_cell
from benchmarks.study.grid import MAIN, PHASES, Made, cells_of
from benchmarks.study.numerics import kind_of, machine
from benchmarks.study.store import Row, append, claim, read_rows, results_folder
from benchmarks.study.tasks import TASKS


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run every missing cell, most wanted first")
    run.add_argument("--jobs", type=int, default=1, help="processes in parallel")
    run.add_argument("--cells", type=int, default=None, help="stop after this many cells")
    run.add_argument("--seconds", type=float, default=math.inf, help="stop after about this long")
    run.add_argument("--until", type=float, help="stop at about this time, in seconds since 1970")
    run.add_argument("--file", help="one file for all rows; otherwise one per task, regime and split")
    run.add_argument("--retry", action="store_true", help="rerun cells recorded as failed")
    cost = commands.add_parser("cost", help="measure one cell of each task")
    cost.add_argument("--tasks", nargs="*", default=list(TASKS))
    cost.add_argument("--training", default="decayed")
    one = commands.add_parser("cell", help="run one cell, and print its rows")
    one.add_argument("name")
    one.add_argument("--check", action="store_true", help="compare it with its rows in the results")
    commands.add_parser("status", help="count cells")
    commands.add_parser("evidence", help="generate the page from the rows, and update quotes of it")
    packed = commands.add_parser("pack", help="write model and tasks for a machine that has neither")
    packed.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "pack":
        from benchmarks.study.pack import write as write_pack

        write_pack(given.folder)
        return 0
    if given.command == "evidence":
        from benchmarks.study.evidence import ROOT, requote, write

        for path in (*write(results_folder(), ROOT / "docs"), *requote(results_folder())):
            print(path)
        return 0
    torch.set_num_threads(1)  # a cell gives the same bits every time it is run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    if given.command == "run":
        return run_grid(given)
    if given.command == "cost":
        return print_cost(given.tasks, given.training)
    if given.command == "cell":
        return print_cell(parse_cell(given.name), given.check)
    return print_status()


def run_grid(given: argparse.Namespace) -> int:
    """Run cells until none is missing. A failed cell is recorded with its error, and the run goes on.

    Args:
        given: jobs (processes in parallel, including this one), cells (of this process; None: all), seconds or
            until (no cell is started that would end later if it took as long as this process's longest so far),
            file, and retry (whether cells that failed before are run again).
    """
    # A signal ends the other processes too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    until, longest = given.until or time.time() + given.seconds, 0.0
    tried, folder = set(), results_folder()
    command = [sys.executable, "-m", "benchmarks.study", "run", "--until", str(until)]
    command += [*(["--file", given.file] if given.file else []), *(["--retry"] if given.retry else [])]
    others = [subprocess.Popen(command) for _ in range(1, given.jobs)]
    try:
        while time.time() + longest < until and (given.cells is None or len(tried) < given.cells):
            began = time.time()
            cell, wait = _make_next(folder, given.file, tried if given.retry else None)
            if cell is not None:
                tried.add((cell.name, cell.fingerprint))
                longest = max(longest, time.time() - began)
            elif wait:  # cells that others are running may make more available
                time.sleep(5)
            else:
                break
        return max([other.wait() for other in others], default=0)
    finally:
        for other in others:
            other.terminate()


def _make_next(
    folder: Path, file: str | None, tried: set[tuple[str, str]] | None
) -> tuple[Cell | None, bool]:
    """Run the most wanted cell that is neither done nor held by another process.

    Args:
        folder: of the rows.
        file: where its rows go; None: the cell's own file.
        tried: None: a recorded failure is final. Otherwise a failure is final for these cells only.

    Returns:
        The cell, or None if there is none; and whether others hold some.
    """
    wait = False
    for cell in _made(folder, tried).missing():
        with claim(folder, cell.name) as held:
            if not held:
                wait = True
                continue
            if _made(folder, tried).on(_here(), cell):
                continue  # another process has finished it since
            began = time.perf_counter()
            found = make(cell)
            append(folder, file or cell.file, found)
            note, seconds = found[0].get("failed") or f"{len(found)} readouts", time.perf_counter() - began
            print(f"{time.strftime('%H:%M:%S')} {cell.name}: {note}, {seconds:.0f} s", flush=True)
            return cell, False
    return None, wait


def _here() -> str:
    return kind_of({"machine": machine()})


def _made(folder: Path, tried: set[tuple[str, str]] | None = None) -> Made:
    """What is done; recorded failures count, or with ``tried`` only those of these cells."""
    rows = read_rows(folder)
    if tried is not None:
        rows = [row for row in rows if "failed" not in row or (row["cell"], row["fingerprint"]) in tried]
    return Made(rows, _here())


def make(cell: Cell) -> list[Row]:
    """The rows of a cell, or one row that says why there are none."""
    try:
        return run_cell(cell)
    except Exception as error:  # out of memory or a missing folder: the other cells are run all the same
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [{**identity(cell, "failed"), "of": 1, "failed": f"{type(error).__name__}: {error}"}]


def print_cost(tasks: list[str], training: str) -> int:
    """Print what one cell of each task costs; nothing is kept."""
    print("task        steps  training CPU-s  in all s")
    for task in tasks:
        began = time.process_time()
        row = run_cell(Cell(task, training, "main", 1e-4, 0, "test"))[0]
        total = time.process_time() - began
        print(
            f"{task:10} {row['settings']['steps']:6} {row['cost']['cpu_seconds']:15.1f} {total:9.1f}",
            flush=True,
        )
    return 0


def print_cell(cell: Cell, check: bool) -> int:
    """Print a cell's rows; with ``check``, also whether all that its rows in the results hold is found again."""
    made = make(cell)
    for row in made:
        print(json.dumps(row))
    if not check:
        return 0
    ours = {row["readout"]: _reproducible(row) for row in made}
    kept = {
        row["readout"]: _reproducible(row) for row in read_rows(results_folder())
        if (row["cell"], row["fingerprint"], kind_of(row)) == (cell.name, cell.fingerprint, _here())
    }  # fmt: skip
    found = "the same numbers" if kept else "no rows of this fingerprint and kind of machine"
    other = [f"{name} (made or kept only)" for name in ours.keys() ^ kept.keys()]
    for name in ours.keys() & kept.keys():
        other += [f"{name} ({part})" for part, value in kept[name].items() if ours[name].get(part) != value]
    print(f"other: {', '.join(sorted(other))}" if kept and other else found, file=sys.stderr)
    return 1 if other else 0


def _reproducible(row: Row) -> dict[str, str]:
    """What is the same whenever a cell is run, each part as JSON: NaN equals itself, and a tuple a list."""
    varying = {"cost", "machine", "command"}
    return {part: json.dumps(row[part], sort_keys=True) for part in row.keys() - varying}


def print_status() -> int:
    """Print how many cells of each phase are done, together with their baselines on the same kind of machine."""
    rows = read_rows(results_folder())
    made = _made(results_folder())
    for phase in PHASES:
        cells = [cell for cell in cells_of(phase, rows) if cell.split == phase.split]
        whole = len(phase.trainings) * len(phase.tasks) * len(phase.seeds)
        open_rates = (whole - len(cells)) // len(phase.seeds)
        names = "main trainings" if phase.trainings == MAIN else ", ".join(phase.trainings)
        print(
            f"{sum(map(made.there, cells)):5} of {whole:5}  {phase.split}, {phase.regime}, "
            f"{len(phase.seeds)} seeds, {' '.join(phase.tasks)}: {names}; rates to find: {open_rates}"
        )
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        print(f"failed: {row['cell']}: {row['failed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
