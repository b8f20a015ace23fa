r"""Runs a recipe with several seeds, and several values of settings, one run after the other; then compares them.

    swaft sweep recipes/classification.py --config recipes/configs/classification/mrpc.yaml \
        train.output_dir=runs/mrpc --seeds 5 --set averaging.rule=swa,none
    swaft sweep --config_file launch/accelerate/zero2.yaml recipes/seq2seq.py ... --seeds 5 --slurm job.sbatch

The line is that of `accelerate launch`, with `train.output_dir` naming the folder of all runs. Each run gets a
folder inside, `averaging.rule=swa/seed-1` say. A run that has ended with the same line is left alone; one that
was interrupted resumes. At the end there is a table, and a page of all runs, report.html (swaft report).

  --seeds N | A,B,...     how many seeds, from 1 on, or which
  --set NAME=V,V,...      values of a setting, each with every seed; of several settings all combinations
  --slurm FILE            run nothing: write an array job of all runs that have not ended, to be submitted by sbatch
  --json                  print the result as JSON, and what the runs print on stderr

Exit code: 0; 1 where a run failed (the others are run all the same), or nothing was run.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from swaft.cli import CommandParser
from swaft.errors import ConfigError

OUTPUT = "train.output_dir="
RECORD = "sweep.json"
"""File of the lines that runs were started with, in the folder of all runs."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    folder: Path
    """Its run folder."""
    words: list[str]
    """Its line, behind `accelerate launch`."""

    @property
    def has_ended(self) -> bool:
        """Whether its scores are there."""
        return (self.folder / "summary.json").is_file()


def run(words: Sequence[str]) -> int:
    """Run all runs that have not ended, print how they compare, and return the exit code."""
    options, line = _parser().parse_known_args(list(words))
    base, runs = plan_runs(line, options.seeds, options.set)
    record_lines(base, runs)
    waiting = [each for each in runs if not each.has_ended]
    if options.slurm is not None:
        options.slurm.write_text(array_job(waiting), encoding="utf-8")
        print(f"{options.slurm}: {len(waiting)} of {len(runs)} runs; sbatch {options.slurm}")
        return 0
    out = sys.stderr if options.json else sys.stdout  # of what the runs say
    failed = []
    for number, each in enumerate(waiting, start=1):
        print(f"[{number} of {len(waiting)}] {each.folder}", file=out, flush=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", *each.words]
        if subprocess.run(launch, stdout=out).returncode:
            failed.append(str(each.folder))
    ended = [each.folder for each in runs if each.has_ended]
    compared = compare_runs(base, ended) if ended else ["no run has ended"]
    if options.json:
        print(
            json.dumps(
                {"ended": [str(each) for each in ended], "failed": failed, "compared": compared}, indent=2
            )
        )
    else:
        print("\n".join([*compared, *(f"failed: {each}" for each in failed)]))
    return 1 if failed else 0


def plan_runs(line: Sequence[str], seeds: Sequence[int], sets: Sequence[str]) -> tuple[Path, list[SweepRun]]:
    """Return the folder of all runs, and the runs: every combination of values with every seed.

    Args:
        line: words behind `accelerate launch`.
        seeds: of the runs.
        sets: ``name=value,value`` each.

    Raises:
        ConfigError: there is no folder, or a set that names no values.
    """
    folders = [word.removeprefix(OUTPUT) for word in line if word.startswith(OUTPUT)]
    if not folders:
        raise ConfigError("no folder for the runs; add train.output_dir=runs/sweep, say, to the line")
    for each in sets:
        name, _, values = each.partition("=")
        if "." not in name or not all(values.split(",")):
            raise ConfigError(
                f"--set {each} names no setting with values; expected averaging.rule=swa,none, say"
            )
    base, rest = Path(folders[-1]), [word for word in line if not word.startswith(OUTPUT)]
    choices = [
        [f"{name}={value}" for value in values.split(",")]
        for name, _, values in (each.partition("=") for each in sets)
    ]
    runs = []
    for chosen in itertools.product(*choices):
        for seed in seeds:
            folder = base / ",".join(chosen) / f"seed-{seed}"
            runs.append(SweepRun(folder, [*rest, *chosen, f"train.seed={seed}", f"{OUTPUT}{folder}"]))
    return base, runs


def record_lines(base: Path, runs: Sequence[SweepRun]) -> None:
    """Write down the line of every run, and refuse folders of runs that have ended with another line.

    Raises:
        ConfigError: names the first such folder and both lines.
    """
    record = base / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for each in runs:
        before = known.get(str(each.folder))
        if each.has_ended and before != each.words:
            ran = "another line, not of this sweep" if before is None else shlex.join(before)
            raise ConfigError(
                f"{each.folder} holds a run of {ran}; expected {shlex.join(each.words)}. Name another "
                "train.output_dir, or remove that folder"
            )
    base.mkdir(parents=True, exist_ok=True)
    lines = known | {str(each.folder): each.words for each in runs}
    record.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def array_job(runs: Sequence[SweepRun]) -> str:
    """Return a SLURM script that starts one of these runs in each task of an array."""
    cases = "\n".join(
        f"{place}) accelerate launch {shlex.join(each.words)} ;;" for place, each in enumerate(runs)
    )
    return (
        f"#!/bin/bash\n#SBATCH --array=0-{max(0, len(runs) - 1)}\n#SBATCH --signal=B:TERM@300\n"
        f"case $SLURM_ARRAY_TASK_ID in\n{cases}\nesac\n"
    )


def compare_runs(base: Path, folders: Sequence[Path]) -> list[str]:
    """Return the table of runs that have ended, a line a score, and write their page where matplotlib is there."""
    from swaft.report.compare import arms_of, compare
    from swaft.report.runs import read_run

    runs = [read_run(folder) for folder in folders]
    arms = arms_of(runs)
    lines = []
    for split, score in [(split, score) for split, kinds in runs[0].final.items() for score in kinds["last"]]:
        for arm, kind in itertools.product(arms, ("last", "averaged")):
            scores = [each.final.get(split, {}).get(kind, {}) for each in arms[arm]]
            values = [each[score] for each in scores if score in each]
            if values:
                spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
                lines.append(
                    f"{split} {score:<12} {arm}, {kind}: {mean(values):.4g}{spread} ({len(values)} seeds)"
                )
        for each in compare(arms, split, score):
            interval = f" (95 %: {each.interval[0]:+.3g} to {each.interval[1]:+.3g})" if each.interval else ""
            lines.append(f"{split} {score:<12} {each.what}: {each.mean:+.4g}{interval}")
    try:
        from swaft.report.page import render
    except ModuleNotFoundError as error:
        return [*lines, f"no page: {error.name} is not installed; pip install 'swaft[report]'"]
    page = base / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    return [*lines, str(page)]


def _seeds(word: str) -> list[int]:
    numbers = [int(each) for each in word.split(",")]
    return numbers if "," in word else list(range(1, numbers[0] + 1))


def _parser() -> CommandParser:
    parser = CommandParser("sweep")
    parser.add_argument("--seeds", type=_seeds, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--slurm", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser
