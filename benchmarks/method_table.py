"""Fine-tunes two small tasks under each method and writes the table of `recipes/README.md`, wins and losses alike.

    python -m benchmarks.method_table            # about 45 minutes on 2 cores; a second call continues
    python -m benchmarks.method_table --table    # print the table from benchmarks/results/method_table.json

Three trainings per task and seed, through the recipe as a user starts it: *decayed* (linear decay, no averaging),
*constant* (constant rate after warmup; its last weights are one arm, their average the next) and *R3F* (linear
decay, the paper's noise). Every training takes the same number of optimizer steps. Nothing is chosen on any row:
settings are those below, the validation split is not used, and the test split is scored once, at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.trainings import ROOT, train_once

RUNS = ROOT / "runs" / "method_table"
RESULTS = ROOT / "benchmarks" / "results" / "method_table.json"
TASKS = ("trec", "cr")
SEEDS = (1, 2, 3)
COMMON = (
    "train.num_train_epochs=2",
    "train.learning_rate=1e-4",
    "train.per_device_train_batch_size=32",
    "data.max_train_samples=2500",
)
TRAININGS = {
    "decayed": ("averaging.rule=none", "train.lr_scheduler_type=linear"),
    "constant": ("averaging.rule=swa", "averaging.start=0.5"),
    "r3f": ("averaging.rule=none", "train.lr_scheduler_type=linear", "noise.kind=r3f"),
}
ARMS = {
    "decayed baseline": ("decayed", "last"),
    "constant rate, last iterate": ("constant", "last"),
    "constant rate, SWA": ("constant", "averaged"),
    "R3F (paper), decayed": ("r3f", "last"),
}


def main() -> None:
    """Run what is missing, then write results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of the committed results")
    if not parser.parse_args().table:
        # One thread per training and one training per core: on such a small model threads wait more than they work.
        with ThreadPoolExecutor(
            os.cpu_count()
        ) as pool:  # seed by seed: if it ends early, comparisons are still complete
            list(pool.map(run, *zip(*itertools.product(SEEDS, TASKS, TRAININGS), strict=True)))
        RESULTS.write_text(json.dumps(collect(), indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


def run(seed: int, task: str, training: str) -> None:
    """Train once, unless there is a finished run."""
    overrides = (*COMMON, *TRAININGS[training], f"train.seed={seed}")
    train_once(folder_of(task, training, seed), "classification", f"classification/{task}.yaml", overrides)


def folder_of(task: str, training: str, seed: int) -> Path:
    """Run folder of one training."""
    return RUNS / f"{task}-{training}-{seed}"


def collect() -> dict[str, object]:
    """Test scores, steps and seconds of every training, with what they were measured on."""
    trainings = {}
    for task in TASKS:
        for training in TRAININGS:
            for seed in SEEDS:
                summary = json.loads((folder_of(task, training, seed) / "summary.json").read_text())
                trainings[f"{task} {training} {seed}"] = {
                    "test": summary["scores"]["test"],
                    "metric": summary["metric"],
                    "steps": summary["steps"],
                }
    settings = {"common": COMMON, "trainings": TRAININGS, "seeds": SEEDS}
    return {"environment": environment(), "settings": settings, "trainings": trainings}


def table(results: dict) -> str:
    """Markdown: mean and spread over seeds of the test score and loss, one row per arm."""
    lines = [
        "| task | arm | accuracy by seed | mean ± sd | loss, mean | steps |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for arm, (training, weights) in ARMS.items():
            runs = [
                results["trainings"][f"{task} {training} {seed}"] for seed in results["settings"]["seeds"]
            ]
            scores = [100 * run["test"][weights][run["metric"]] for run in runs]
            loss = statistics.mean(run["test"][weights]["loss"] for run in runs)
            lines.append(
                f"| {task} | {arm} | {', '.join(f'{score:.1f}' for score in scores)} | "
                f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} | {loss:.3f} | "
                f"{runs[0]['steps']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
