"""Runs every config of the recipes for a few steps, and writes the tables of `recipes/README.md`: cost and result.

    python -m benchmarks.recipe_table            # 20 minutes on a core; a second call continues
    python -m benchmarks.recipe_table --table    # print the tables from benchmarks/results/recipes.json

Each is started as a user starts it, in one process and one thread, with the config as shipped except for the length
of the run and the number of evaluated rows, which the table states. If a config does not run, its message is in the
table. Scores after so few steps show that the recipe works, not how well a method does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.ranks import ROOT

RUNS = ROOT / "runs" / "recipe_table"
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"
LENGTHS = {
    "classification": ("train.max_steps=30", "data.max_eval_samples=200", "data.max_predict_samples=200"),
    "question_answering": ("train.max_steps=20", "data.max_eval_samples=40", "data.max_predict_samples=40"),
    "seq2seq": ("train.max_steps=20", "data.max_eval_samples=16", "data.max_predict_samples=16"),
    "causal_lm": ("train.max_steps=20", "data.max_eval_samples=100", "data.max_predict_samples=100"),
}
SHORTER = {
    "seq2seq/scitldr": ("train.per_device_train_batch_size=4",),
    "seq2seq/tatoeba_en_fr": ("train.per_device_train_batch_size=32",),
}
TITLES = {
    "classification": "Classification",
    "question_answering": "Question answering",
    "seq2seq": "Text generation",
    "causal_lm": "Decoders",
}


def main() -> None:
    """Run what is missing, then write results and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables of the committed results")
    if not parser.parse_args().table:
        runs = {name: run(name) for recipe in LENGTHS for name in configs(recipe)}
        RESULTS.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")
    print(tables(json.loads(RESULTS.read_text())["runs"]))


def configs(recipe: str) -> list[str]:
    """Names of a recipe's configs, such as ``classification/mrpc``."""
    return [
        f"{recipe}/{path.stem}" for path in sorted((ROOT / "recipes" / "configs" / recipe).glob("*.yaml"))
    ]


def run(name: str) -> dict[str, Any]:
    """Run a config once, unless its result exists; return its cost and result."""
    folder, recipe = RUNS / name.replace("/", "-"), name.split("/")[0]
    kept = folder.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    if folder.exists():  # an unfinished run
        folder.rename(folder.with_name(f"{folder.name}.broken-off-{time.time_ns()}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    overrides = [*LENGTHS[recipe], *SHORTER.get(name, ())]
    words = [f"recipes/{recipe}.py", "--config", f"recipes/configs/{name}.yaml", *overrides]
    print(name, flush=True)
    started, log = time.monotonic(), folder.with_suffix(".log")
    with log.open("w") as screen:
        process = subprocess.Popen(
            [sys.executable, *words, f"train.output_dir={folder}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=screen,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    result: dict[str, Any] = {
        "overrides": overrides,
        "seconds": round(time.monotonic() - started),
        "peak_memory_bytes": 1024 * usage.ru_maxrss,
    }
    if os.waitstatus_to_exitcode(status) == 0:
        summary = json.loads((folder / "summary.json").read_text())
        result |= {name: summary[name] for name in ("metric", "scores", "steps", "train_seconds")}
    else:
        told = log.read_text().partition("error: ")[2].splitlines()
        result["error"] = " ".join(line.strip() for line in told) or "no message"
    kept.write_text(json.dumps(result, indent=1))
    return result


def tables(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table per recipe, one row per config."""
    lines = []
    for recipe, title in TITLES.items():
        lines += [
            f"**{title}**: `accelerate launch recipes/{recipe}.py --config recipes/configs/{recipe}/NAME.yaml "
            f"{' '.join(LENGTHS[recipe])}`",
            "",
            "| NAME | time | of it training | peak memory | score | last | averaged |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row(name, result) for name, result in runs.items() if name.startswith(f"{recipe}/")]
        lines.append("")
    return "\n".join(lines).rstrip()


def row(name: str, result: dict[str, Any]) -> str:
    """One config's line of its table."""
    more = "".join(f" `{override}`" for override in SHORTER.get(name, ()))
    label = f"`{Path(name).name}`{more}"
    if "error" in result:
        return f"| {label} | | | | did not run: {result['error'].split(';')[0]} | | |"
    scores = result["scores"]
    split = next((split for split in ("test", "validation") if split in scores), None)
    found = scores[split] if split else {}
    values = [
        f"{found[kind][result['metric']]:.4g}" if kind in found else "" for kind in ("last", "averaged")
    ]
    metric = f"{result['metric']}, {split}" if split else "no rows to evaluate on"
    return (
        f"| {label} | {result['seconds']} s | {result['train_seconds']:.0f} s | "
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB | {metric} | {' | '.join(values)} |"
    )


if __name__ == "__main__":
    main()
