"""Memory that `swaft plan` predicts, next to what ranks really take, on models and engines that run here.

    python -m benchmarks.plan_accuracy            # about 10 minutes on 2 quiet cores, 3 GB at most
    python -m benchmarks.plan_accuracy --quick    # one tiny model in one process; writes nothing without --out
    python -m benchmarks.plan_accuracy --predict  # 3 minutes: new predictions next to the peaks on file

Every engine is launched as users launch it, over gloo on the CPU. Its ranks train a tiny model first; then, for
each model, a rank's growth at its peak (VmHWM, reset, less VmRSS before the model is built) is compared with the
plan of the same launch line. glibc is configured to return freed blocks at once, so that the peak is one
of live memory. Writes benchmarks/results/plan_accuracy.json, and prints a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import swaft
from benchmarks import command
from benchmarks.plan_accuracy_cases import LINES, MODELS, WARM_UP, Model
from benchmarks.ranks import ROOT
from swaft.training.config import AveragingConfig, NoiseConfig
from swaft.training.launch.accelerator import resolve_engine
from swaft.training.launch.deepspeed_extension import use_environment
from swaft.training.launch.launcher import read_launch
from swaft.training.models.build import build_objective
from swaft.training.models.pretrained import hidden_size
from swaft.training.planning.memory import PlannedEngine
from swaft.training.planning.plan import RunPlan, plan_run
from swaft.training.planning.step import PlannedModel

WORKER = "benchmarks/plan_accuracy_worker.py"
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
TIMEOUT_S = 1800


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Bytes of both, and the error of the prediction as a share of the measurement."""
    models = {"tiny": WARM_UP} if quick else MODELS
    lines = {"one process": LINES["one process"]} if quick else LINES
    cases = {}
    for engine, line in lines.items():
        measured = measure_line(line, list(models))
        cases[engine] = {
            name: compared(plan_of(line, model), measured[name]) for name, model in models.items()
        }
    return {"largest error": largest_error(cases), "cases": cases}


def rows(result: dict) -> list[Sequence[object]]:
    """One line per model and engine."""
    return [
        (
            f"{engine}, {name}",
            f"predicted {case['predicted bytes'] / 1e6:,.0f} MB",
            f"measured {case['measured bytes'] / 1e6:,.0f} MB",
            f"error {case['error']:+.1%}",
        )
        for engine, each in result["cases"].items()
        for name, case in each.items()
    ]


def measure_line(line: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Launch the ranks of a line, and return the most bytes that any of them took for each model.

    Raises:
        RuntimeError: they failed or took too long; the message has the end of their output.
    """
    use_environment()
    environment = os.environ | ALLOCATOR
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *line]
        words = [*launch, "--main_process_port", "0", WORKER, folder, *names]
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-6000:]}")
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
    return {name: max(rank[name] for rank in ranks) for name in names}


def plan_of(line: Sequence[str], model: Model) -> RunPlan:
    """Plan what the worker does under a launch line."""
    train = model.train()
    launch = read_launch([*line, str(ROOT / WORKER)])
    settings = resolve_engine(train, launch.environ, hidden_size=hidden_size(model.configuration()))
    return plan_run(
        PlannedEngine(launch, settings, on_cpu=True),
        SimpleNamespace(train=train, averaging=AveragingConfig()),
        PlannedModel(model.build, model.batch),
        build_objective(NoiseConfig(), seed=0),
        swaft.SWA(start=1).plan(total_steps=3),
    )


def compared(plan: RunPlan, measured: int) -> dict[str, object]:
    """A prediction next to its measurement."""
    fullest = max(plan.phases, key=lambda phase: phase.host_bytes)
    return {
        "parameters": plan.parameters,
        "predicted bytes": plan.host_bytes,
        "measured bytes": measured,
        "error": round(plan.host_bytes / measured - 1, 4),
        "fullest": fullest.name,
        "phases": {phase.name: dict(phase.host) for phase in plan.phases},
    }


def largest_error(cases: dict[str, dict[str, dict]]) -> float:
    """The largest error in absolute value."""
    return max(abs(case["error"]) for each in cases.values() for case in each.values())


def predict_again() -> None:
    """Put the current predictions next to the peaks in the results file, say so in it, and print the table."""
    use_environment()
    path = command.RESULTS / "plan_accuracy.json"
    results = json.loads(path.read_text())
    found = results["accuracy"]
    for engine, each in found["cases"].items():
        for name, case in each.items():
            each[name] = compared(plan_of(LINES[engine], MODELS[name]), case["measured bytes"])
    found["largest error"] = largest_error(found["cases"])
    results["predictions"] = (
        "made after the peaks were measured, with --predict; the environment is the peaks'"
    )
    path.write_text(json.dumps(results, indent=1) + "\n")
    command.print_table(rows(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    if "--predict" in (sys.argv[1:] if arguments is None else arguments):
        return predict_again()
    command.run("plan_accuracy", {"accuracy": sys.modules[__name__]}, arguments, about=__doc__)


if __name__ == "__main__":
    main()
