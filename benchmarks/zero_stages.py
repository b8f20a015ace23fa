"""The losses of one run under ZeRO-2 and ZeRO-3, in bf16: partitioning must not change what is learnt.

    python -m benchmarks.zero_stages        # 10 minutes on two cores

60 steps of `e2e.yaml` on two CPU ranks, started as a user starts them. A loss between 4 and 8 in bf16 is a multiple
of 2**-5, between 2 and 4 one of 2**-6 (8 bits); differences are given in these units. The stages sum the ranks'
gradients in different orders, and a gradient that is rounded to bf16 the other way moves the weights slightly.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

from benchmarks.environment import environment
from benchmarks.ranks import ROOT

STEPS = 60
RUNS = ROOT / "runs" / "zero_stages"
RESULTS = ROOT / "benchmarks" / "results" / "zero_stages.json"


def main() -> None:
    """Train what is missing, compare, and write the result."""
    losses = {stage: train(stage) for stage in ("zero2", "zero3")}
    units = [
        abs(a - b) / 2.0 ** (math.floor(math.log2(a)) - 7)
        for a, b in zip(losses["zero2"], losses["zero3"], strict=True)
    ]
    result = {
        "environment": environment(),
        "steps": STEPS,
        "steps with the same loss": sum(unit == 0 for unit in units),
        "steps at most one bf16 unit apart": sum(unit <= 1 for unit in units),
        "largest difference, bf16 units": round(max(units), 3),
        "largest difference, share of the loss": round(
            max(abs(a - b) / a for a, b in zip(losses["zero2"], losses["zero3"], strict=True)), 5
        ),
        "losses": losses,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name not in ("environment", "losses")})


def train(stage: str) -> list[float]:
    """Train under one stage, unless that has been done; returns the loss of every step."""
    folder = RUNS / stage
    if not (folder / "summary.json").exists():
        words = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", f"launch/accelerate/{stage}_cpu.yaml", "--mixed_precision", "bf16"),
            *("recipes/seq2seq.py", "--config", "recipes/configs/seq2seq/e2e.yaml"),
            *(f"train.max_steps={STEPS}", "train.logging_steps=1", f"train.output_dir={folder}"),
            *("data.max_eval_samples=8", "data.max_predict_samples=8"),
        ]
        subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


if __name__ == "__main__":
    main()
