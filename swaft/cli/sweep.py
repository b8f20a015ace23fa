r"""Runs a recipe with several seeds and several values of settings, one run after the other; then compares them.

    swaft sweep recipes/classification.py --config recipes/configs/classification/mrpc.yaml \
        train.output_dir=runs/mrpc --seeds 5 --set averaging.rule=ema,none
    swaft sweep --config_file launch/accelerate/zero2.yaml recipes/seq2seq.py ... --seeds 5 --slurm job.sbatch

The line is that of `accelerate launch`, with `train.output_dir` as the folder for all runs. Each run gets a
folder inside it, such as `averaging.rule=ema/seed-1` (a / in a value becomes --). A run that has finished with the
same line is left alone; one that was interrupted resumes: start the same line again. A folder in which a run has
begun with another line is refused. If the sweep is ended, so is the run in progress (with SIGTERM, at which it
writes a checkpoint). At the end there is a table, and a page of all runs, report.html (swaft report).

  --seeds N | A,B,...     how many seeds, from 1 on, or which ones
  --set NAME=V,V,...      values of a setting, each with every seed; with several settings, all combinations. A
                          value with commas needs quotes:
                          --set 'model.lora_target_modules="query,value",all-linear'.
                          Settings that only some values use (noise.weight with noise.kind=none,rdrop) go into a
                          --config file; the other values drop them
  --slurm FILE            run nothing: write an array job of the runs that have not finished. Submit it from the
                          folder that holds launch/, with resources as for launch/slurm/train.sbatch. The line then
                          has to start with --config_file FILE. Once all have finished, it prints the table
  --json                  print the result as JSON, and the output of the runs on stderr

Exit code: 0; 1 if a run failed (the others still run), or nothing was run; 130 on Ctrl-C.
"""

from __future__ import annotations

import csv
import ctypes
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import IO

from swaft.cli import CommandParser, reading
from swaft.errors import ConfigError
from swaft.report.compare import arms_of, compare, scores_of
from swaft.report.runs import json_object, read_run
from swaft.storage import write_durably
from swaft.storage.files import status

OUTPUT, SEED = "train.output_dir", "train.seed"
"""Settings that a sweep gives each run itself."""
RECORD = "sweep.json"
"""File with the lines that runs were started with, in the folder of all runs."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: which signal to get when the parent ends."""
JOB = """\
#!/bin/bash
#SBATCH --job-name=swaft-sweep
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
cd "${{SLURM_SUBMIT_DIR:-.}}"
exec bash launch/slurm/train.sbatch "$@" "${{line[@]}}"
"""
"""Array job: each task passes its line to the script that starts one run, and saves it before time is up."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    folder: Path
    """Its run folder."""
    words: list[str]
    """Its line, after `accelerate launch`."""

    @property
    def has_begun(self) -> bool:
        """Whether its settings exist."""
        return status(self.folder / "config.yaml") is not None

    @property
    def has_ended(self) -> bool:
        """Whether its scores exist."""
        return status(self.folder / "summary.json") is not None


def run(words: Sequence[str]) -> int:
    """Run all runs that have not finished, print how they compare, and return the exit code."""
    options, line = _parser().parse_known_args(list(words))
    base, runs = plan_runs(line, options.seeds, options.set)
    record_lines(base, runs)
    waiting = [each for each in runs if not each.has_ended]
    if options.slurm is not None and waiting:
        write_durably(options.slurm, array_job(waiting).encode())
        text = f"{options.slurm}: {len(waiting)} of {len(runs)} runs; sbatch RESOURCES {options.slurm}"
        print(json.dumps({"job": str(options.slurm), "runs": len(waiting)}) if options.json else text)
        return 0
    out = sys.stderr if options.json else sys.stdout  # for the output of the runs
    failed = []
    for number, each in enumerate(waiting, start=1):
        if each.has_ended:  # meanwhile, in another sweep of this folder
            continue
        print(f"[{number} of {len(waiting)}] {each.folder}", file=out, flush=True)
        try:
            if launch(each.words, out):
                failed.append(each)
        except KeyboardInterrupt:
            print("interrupted; the same line continues", file=sys.stderr)
            return 128 + signal.SIGINT
    # Another sweep of this folder may have been in a run that failed here, and have finished it meanwhile.
    failed = [str(each.folder) for each in failed if not each.has_ended]
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


def launch(words: Sequence[str], out: IO[str]) -> int:
    """Run `accelerate launch` with these words, its output in a file, and return its exit code.

    It gets SIGTERM when this process ends, however it ends.
    """
    libc, command = ctypes.CDLL(None), [sys.executable, "-m", "accelerate.commands.launch", *words]

    def end_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))

    return subprocess.run(command, stdout=out, preexec_fn=end_with_parent).returncode


def plan_runs(line: Sequence[str], seeds: Sequence[int], sets: Sequence[str]) -> tuple[Path, list[SweepRun]]:
    """Return the folder of all runs, and the runs: every combination of values with every seed.

    Args:
        line: words after `accelerate launch`.
        seeds: seeds of the runs.
        sets: ``name=value,value`` each.

    Raises:
        ConfigError: the line has no folder, or has a seed; or a set has no values, or is given twice.
    """
    from swaft.training.config.values import split_words  # here, so that --help does not wait for it

    own, rest = dict[str, str](), list[str]()
    for words, name, value in split_words(line):
        if name in (OUTPUT, SEED) and value is not None:
            own[name] = value
        else:
            rest += words
    if not own.get(OUTPUT):
        raise ConfigError(f"no folder for the runs; add {OUTPUT}=runs/sweep, say, to the line")
    if SEED in own:
        raise ConfigError(
            f"{SEED} is {own[SEED]}, but a sweep gives each run its own; remove it, and set --seeds"
        )
    choices = dict[str, list[str]]()
    for each in sets:
        name, _, text = each.partition("=")
        try:
            [values] = csv.reader([text]) if text else [[""]]
        except csv.Error as error:
            raise ConfigError(f"--set {each} cannot be split at its commas: {error}") from error
        if "." not in name or not all(values) or name in (OUTPUT, SEED):
            raise ConfigError(
                f"--set {each} names no setting with values; expected averaging.rule=ema,none, say"
            )
        if name in choices:
            raise ConfigError("--set names a setting twice; write its values in one: --set NAME=VALUE,VALUE")
        choices[name] = [f"{name}={value}" for value in dict.fromkeys(values)]
    base = Path(own[OUTPUT]).expanduser()
    runs = []
    for chosen in itertools.product(*choices.values()):
        for seed in seeds:
            folder = base / ",".join(chosen).replace("/", "--") / f"seed-{seed}"
            runs.append(SweepRun(folder, [*rest, *chosen, f"{SEED}={seed}", f"{OUTPUT}={folder}"]))
    return base, runs


def record_lines(base: Path, runs: Sequence[SweepRun]) -> None:
    """Write down the line of every run, and refuse folders of runs that have begun with another line.

    Raises:
        ConfigError: names the first such folder and both lines.
    """
    record = base / RECORD
    known = json_object(record) or {}
    for each in runs:
        before = known.get(str(each.folder))
        if each.has_begun and before != each.words:
            ran = "another line, not of this sweep" if before is None else shlex.join(before)
            raise ConfigError(
                f"{each.folder} holds a run of {ran}; expected {shlex.join(each.words)}. Name another "
                "train.output_dir, or remove that folder"
            )
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: {base} cannot be made a folder ({error.strerror}); name another"
        ) from error
    lines = known | {str(each.folder): each.words for each in runs}
    write_durably(record, (json.dumps(lines, indent=1) + "\n").encode())


def array_job(runs: Sequence[SweepRun]) -> str:
    """Return a SLURM script that starts one of these runs, at least one, in each task of an array.

    Raises:
        ConfigError: launch/slurm/train.sbatch does not accept a line.
    """
    for each in runs:
        if each.words[:1] != ["--config_file"] or [*each.words, "", "-"][2].startswith("-"):
            raise ConfigError(
                f"--slurm: the line is {shlex.join(each.words)}; expected --config_file FILE, the recipe and its "
                "settings, as launch/slurm/train.sbatch takes them"
            )
    cases = "\n".join(f"{place}) line=({shlex.join(each.words[1:])}) ;;" for place, each in enumerate(runs))
    return JOB.format(last=len(runs) - 1, cases=cases)


def compare_runs(base: Path, folders: Sequence[Path]) -> list[str]:
    """Return the table of finished runs, one line per score, and write their page if matplotlib is installed."""
    runs = [read_run(folder) for folder in folders]
    arms = arms_of(runs)
    lines = []
    for split, score in scores_of(runs):
        for arm, kind in itertools.product(arms, ("last", "averaged")):
            scores = [each.score(split, kind, score) for each in arms[arm]]
            if values := [each for each in scores if each is not None]:
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
    try:
        page.write_text(render(runs), encoding="utf-8")
    except OSError as error:
        return [*lines, f"no page: {page} cannot be written ({error.strerror})"]
    return [*lines, str(page)]


def _seeds(word: str) -> list[int]:
    numbers = [int(each) for each in word.split(",")]
    seeds = numbers if "," in word else list(range(1, numbers[0] + 1))
    if not seeds or len({*seeds}) < len(seeds):
        raise ValueError
    return seeds


def _parser() -> CommandParser:
    parser = CommandParser("sweep")
    parser.add_argument(
        "--seeds",
        type=reading(_seeds, "a number of seeds, or different seeds separated by commas"),
        required=True,
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--slurm", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser
