"""Trains a small T5 from random weights on e2e, and writes the table of `recipes/README.md`, whatever comes out.

    python -m benchmarks.e2e_table            # about 90 minutes on a core; a second call continues
    python -m benchmarks.e2e_table --table    # print the table from benchmarks/results/e2e.json

Two trainings per seed, through the recipe as a user starts it: *decayed* (linear decay to 0, no averaging) and
*constant* (constant rate after warmup; its last weights are one arm, the mean of its second half the next). Both
take the same number of optimizer steps, with the settings of recipes/configs/seq2seq/e2e.yaml. Nothing is chosen on
any row: the test split is scored once, at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.environment import environment
from benchmarks.ranks import ROOT

RUNS = ROOT / "runs" / "e2e_table"
RESULTS = ROOT / "benchmarks" / "results" / "e2e.json"
LOGS = ROOT / "benchmarks" / "results" / "e2e"
KEPT = ("log.txt", "metrics.jsonl", "summary.json", "config.yaml", "env.json")
CONFIG = "recipes/configs/seq2seq/e2e.yaml"
SEEDS = (1, 2, 3)
TRAININGS = {
    "decayed": ("averaging.rule=none", "train.lr_scheduler_type=linear"),
    "constant": ("averaging.rule=swa", "averaging.start=0.5"),
}
ARMS = {
    "decayed baseline": ("decayed", "last"),
    "constant rate, last iterate": ("constant", "last"),
    "constant rate, SWA": ("constant", "averaged"),
}
SCORES = {"bleu": "BLEU", "rougeL_coco": "ROUGE-L (COCO)", "loss": "loss a token"}


def main() -> None:
    """Run what is missing, then write results and logs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of the committed results")
    if not parser.parse_args().table:
        for seed in SEEDS:  # seed by seed: if it ends early, comparisons are still complete
            for training, overrides in TRAININGS.items():
                train(f"{training}-{seed}", (*overrides, f"train.seed={seed}"))
        RESULTS.write_text(json.dumps(collect(), indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


def train(name: str, overrides: Sequence[str]) -> None:
    """Train in one process and one thread, unless there is a finished run.

    Args:
        name: run folder below `RUNS`; the screen's output goes into log.txt there, once the run is over.
        overrides: settings as ``section.name=value``.
    """
    folder = RUNS / name
    if (folder / "summary.json").exists():
        return
    if folder.exists():  # an unfinished run, which does not count
        folder.rename(folder.with_name(f"{folder.name}.broken-off-{time.time_ns()}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", "launch/accelerate/single.yaml", "--num_cpu_threads_per_process", "1",
        "recipes/seq2seq.py", "--config", CONFIG, *overrides, f"train.output_dir={folder}",
    ]  # fmt: skip
    print(name, flush=True)
    log = folder.with_suffix(".log")
    with log.open("w") as screen:
        subprocess.run(command, cwd=ROOT, check=True, stdout=screen)
    log.rename(folder / "log.txt")


def collect() -> dict[str, object]:
    """Scores, steps and seconds of every training; its logs are copied next to the results."""
    trainings = {}
    for training in TRAININGS:
        for seed in SEEDS:
            name = f"{training}-{seed}"
            for file in KEPT:
                (LOGS / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(RUNS / name / file, LOGS / name / file)
            trainings[f"{training} {seed}"] = json.loads((RUNS / name / "summary.json").read_text())
    settings = {"config": CONFIG, "trainings": TRAININGS, "seeds": SEEDS}
    return {"environment": environment(), "settings": settings, "trainings": trainings}


def table(results: dict) -> str:
    """Markdown: each test score by seed with its mean and spread, one row per arm."""
    lines = ["| arm | " + " | ".join(f"{name} by seed: mean ± sd" for name in SCORES.values()) + " |"]
    lines.append("|---" * (1 + len(SCORES)) + "|")
    for arm, (training, weights) in ARMS.items():
        runs = [results["trainings"][f"{training} {seed}"] for seed in results["settings"]["seeds"]]
        cells = []
        for score in SCORES:
            values = [run["scores"]["test"][weights][score] for run in runs]
            seeds = ", ".join(f"{value:.4g}" for value in values)
            cells.append(f"{seeds}: {statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
