"""Tests, probes and benchmarks on a GPU, within a budget of seconds.

    python -m benchmarks.gpu                    # all of it, in the order of what is worth most; 480 s
    python -m benchmarks.gpu tests probes       # these parts
    python -m benchmarks.gpu --dry              # the same calls on tiny sizes, on a CPU: shows that they run
    python -m benchmarks.gpu --budget 800 flagship

It uses the environment that it runs in, and needs no installation of swaft. What is missing is listed, and the
parts that need it are skipped. Every part has a limit of its own. Results go to ``--out`` (runs/gpu): summary.json
with the exit code and seconds of every part, its log, the JSON of each benchmark, and partial.jsonl, which survives
a kill.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "numpy", "numba", "safetensors", "psutil", "transformers")
"""Without these nothing runs."""
PYTEST = ("-m", "pytest", "-v", "-rA", "-p", "no:randomly", "-m", "gpu", "--durations=10")


@dataclass(frozen=True)
class Part:
    """One call of the run."""

    limit_s: int
    """Seconds after which it is ended."""
    words: tuple[str, ...]
    """Behind the interpreter."""
    dry: tuple[str, ...] | None = None
    """The same on a CPU; None: as `words`, which then skips by itself."""
    needs: tuple[str, ...] = field(default=())
    """Packages without which it is skipped."""


def parts(out: Path) -> dict[str, Part]:
    """Return all parts by name, those first that are worth most."""

    def bench(name: str, *sections: str) -> tuple[str, ...]:
        chosen = tuple(word for section in sections for word in ("--section", section))
        return ("-m", f"benchmarks.{name}", *chosen, "--out", str(out / f"{name}.json"))

    quick = ("--quick",)
    test = (*PYTEST, "--timeout", "120")
    return {
        "tests": Part(170, (*test, "tests/gpu/test_cuda.py", "tests/gpu/test_fused_loss_cuda.py"),
                      needs=("pytest", "pytest_timeout", "hypothesis")),
        "tests of DeepSpeed": Part(150, (*test, "tests/gpu/test_deepspeed_cuda.py"),
                                   needs=("pytest", "pytest_timeout", "deepspeed")),
        "probes": Part(80, ("-m", "benchmarks.gpu.probes", str(out / "probes.json")),
                       ("-m", "benchmarks.gpu.probes", str(out / "probes.json"), *quick)),
        "fused_loss": Part(170, bench("fused_loss", "speed", "memory", "training_step", "error"),
                           (*bench("fused_loss", "speed", "training_step"), *quick)),
        "averaging": Part(120, bench("averaging", "event"), (*bench("averaging", "event"), *quick),
                          needs=("accelerate",)),
        "flagship": Part(240, ("-m", "benchmarks.gpu.flagship", str(out / "flagship.json")),
                         ("-m", "benchmarks.gpu.flagship", str(out / "flagship.json"), *quick)),
    }  # fmt: skip


def main() -> int:
    """Run the parts that the command line names; 0 where none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="tests, 'tests of DeepSpeed', probes, ...; default: all"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    given = parser.parse_args()
    until = time.time() + given.budget
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    known = parts(out)
    unknown = [name for name in given.parts if name not in known]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; expected some of {', '.join(known)}")
    summary: dict[str, object] = {"dry": given.dry, "missing": missing(NEEDED), "parts": {}}
    found: dict[str, dict[str, object]] = {}
    summary["parts"] = found
    for name in given.parts or known:
        found[name] = run_part(name, known[name], out, until=until, dry=given.dry)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"{name:<20} {found[name]}", flush=True)
    return int(any(each.get("exit code") for each in found.values()))


def run_part(name: str, part: Part, out: Path, *, until: float, dry: bool) -> dict[str, object]:
    """Run a part with what time is left, its output to a log; return what came of it."""
    absent = missing((*NEEDED, *part.needs))
    if absent:
        return {"skipped": f"missing: {', '.join(absent)}"}
    seconds = min(part.limit_s, until - time.time())
    if seconds < 10:
        return {"skipped": f"out of time: {seconds:.0f} s left"}
    words = part.dry if dry and part.dry is not None else part.words
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SWAFT_BENCH_UNTIL": str(time.time() + seconds - 5),
        "SWAFT_BENCH_PARTIAL": str(out / "partial.jsonl"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    begun = time.monotonic()
    with (out / f"{name.replace(' ', '_')}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            code = process.wait()
    return {"exit code": 0 if code == 5 else code, "seconds": round(time.monotonic() - begun, 1)}


def missing(names: tuple[str, ...]) -> list[str]:
    """Name the packages that cannot be imported here."""
    return [name for name in names if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    sys.exit(main())
