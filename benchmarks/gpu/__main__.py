"""Tests, probes and benchmarks on a GPU, within a budget of seconds.

    python -m benchmarks.gpu                    # all of it, most valuable first; 480 s
    python -m benchmarks.gpu probes averaging   # these parts
    python -m benchmarks.gpu --dry              # the same calls on tiny sizes, on a CPU: shows that they run
    python -m benchmarks.gpu --wheels FOLDER    # with packages from `benchmarks.gpu.wheels`, if there is no pip

It uses the environment that it runs in, and swaft need not be installed. Missing packages are listed, and the
parts that need them are skipped. Every part has its own time limit. Results go to ``--out`` (runs/gpu):
summary.json with the packages and the exit code and seconds of every part, its log, the JSON of each benchmark, and
partial.jsonl, which survives a kill. The exit code is 1 if a part failed or none ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.wheels import unpack

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "numpy", "numba", "safetensors", "psutil", "transformers")
"""Without these nothing runs."""
USED = (
    *NEEDED,
    "triton",
    "accelerate",
    "deepspeed",
    "liger_kernel",
    "pytest",
    "pytest_timeout",
    "hypothesis",
)
"""Packages whose state is reported; those besides `NEEDED` are used by some parts."""
ABSENT = ("missing", "does not import")
"""Prefixes of the state of an unusable package."""
IMPORTS = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found[name] = str(getattr(module, "__version__", "imports"))
    except ModuleNotFoundError as error:
        found[name] = "missing" if error.name == name else f"does not import: {error}"
    except Exception as error:
        found[name] = f"does not import: {type(error).__name__}: {error}"
cuda = getattr(sys.modules.get("torch"), "cuda", None)
if cuda is not None:
    found["card"] = cuda.get_device_name() if cuda.is_available() else "none"
print(json.dumps(found))
"""
AVERAGING_TESTS, LOSS_TESTS, DEEPSPEED_TESTS = (
    f"tests/gpu/test_{name}.py" for name in ("cuda", "fused_loss_cuda", "deepspeed_cuda")
)
_running: set[subprocess.Popen[bytes]] = set()
"""The running parts, each the leader of its own process group."""
SANITIZED = f"{LOSS_TESTS}::test_the_kernels_touch_no_memory_but_theirs"


@dataclass(frozen=True)
class Part:
    """One call of the run."""

    limit_s: int
    """Seconds after which it is ended."""
    words: tuple[str, ...]
    """Words after the interpreter."""
    dry: tuple[str, ...] | None = None
    """The same for a CPU; None: left out there."""
    needs: tuple[str, ...] = field(default=())
    """Packages without which it is skipped."""
    beside: bool = False
    """Whether it runs alongside the part before it."""


def parts(out: Path) -> dict[str, Part]:
    """Return all parts by name, most valuable first; the limits add up to 480 s."""

    def bench(name: str, *sections: str) -> tuple[str, ...]:
        chosen = tuple(word for section in sections for word in ("--section", section))
        return ("-m", f"benchmarks.{name}", *chosen, "--out", str(out / f"{name}.json"))

    def tests(name: str, *words: str, dry: tuple[str, ...], needs: str = "", beside: bool = False) -> Part:
        """Tests for a card, and the part of them that a CPU can run."""
        call = ("-m", "pytest", "-v", "-rA", "-p", "no:randomly", "--timeout", "120")
        call = (*call, "--continue-on-collection-errors")  # a file that fails to import stops no other
        packages = ("pytest", "pytest_timeout", "hypothesis", *needs.split())
        on_card = (*call, "-m", "gpu", f"--junitxml={out / name}.xml", *words)
        return Part(140, on_card, (*call, *dry), packages, beside)

    spread = ("-n", "4", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    on_devices = [
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/gpu").glob("test_*_on_devices.py"))
    ]
    quick, collect = ("--quick",), ("--collect-only", "-q")
    probes, flagship = (
        ("-m", f"benchmarks.gpu.{name}", str(out / f"{name}.json")) for name in ("probes", "flagship")
    )
    return {
        "tests of averaging": tests(
            "averaging-tests",
            AVERAGING_TESTS,
            *on_devices,
            dry=("-m", "not gpu", AVERAGING_TESTS, *on_devices),
        ),
        # Most of their time goes into compiling.
        "tests of the loss": tests(
            "loss-tests",
            *spread,
            LOSS_TESTS,
            "--deselect",
            SANITIZED,
            dry=(*collect, LOSS_TESTS),
            needs="triton",
            beside=True,
        ),
        "tests of DeepSpeed": tests(
            "deepspeed-tests",
            DEEPSPEED_TESTS,
            dry=(*collect, DEEPSPEED_TESTS),
            needs="deepspeed accelerate",
            beside=True,
        ),
        "probes": Part(60, probes, (*probes, *quick)),
        "fused_loss": Part(
            120,
            bench("fused_loss", "training_step", "speed", "memory", "error"),
            (*bench("fused_loss", "speed", "training_step"), *quick),
        ),
        "averaging": Part(80, bench("averaging_gpu"), (*bench("averaging_gpu"), *quick)),
        "flagship": Part(80, flagship, (*flagship, *quick)),
        "sanitizer": Part(
            290,
            ("-m", "pytest", "-v", "-rA", "--timeout", "280", "-m", "gpu", SANITIZED),
            needs=("pytest", "pytest_timeout", "hypothesis", "triton"),
        ),
    }


def main() -> int:
    """Run the parts given on the command line; return 0 if one ran and none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="'tests of averaging', probes, ...; default: all"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to be unpacked and used")
    given = parser.parse_args()
    until = time.time() + given.budget
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    known = parts(out)
    unknown = [name for name in given.parts if name not in known]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; expected some of {', '.join(known)}")
    site = tempfile.TemporaryDirectory(prefix="swaft-packages-")  # gone when this process ends
    if given.wheels:
        unpack(given.wheels, Path(site.name))
    environment = environment_of([site.name, str(ROOT)], dry=given.dry)
    packages = importable(USED, environment)
    card = packages.pop("card", "none")
    summary: dict[str, Any] = {"dry": given.dry, "card": card, "packages": packages, "parts": {}}
    for name, state in {"card": card, **packages}.items():
        print(f"{name:<20} {state}", flush=True)
    if card == "none" and not given.dry and not packages["torch"].startswith(ABSENT):
        parser.error("torch sees no CUDA device here; expected one, or --dry to try the same calls on a CPU")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_parts)
    for names in side_by_side(given.parts or list(known), known):
        with ThreadPoolExecutor(len(names)) as pool:
            calls = {
                name: pool.submit(
                    run_part, name, known[name], out, environment, packages, until=until, dry=given.dry
                )
                for name in names
            }
            summary["parts"] |= {name: call.result() for name, call in calls.items()}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        for name in names:
            print(f"{name:<20} {summary['parts'][name]}", flush=True)
    codes = [each["exit code"] for each in summary["parts"].values() if "exit code" in each]
    return int(not codes or any(codes))


def end_parts(number: int, _frame: object) -> None:
    """End the running parts, then this process: nothing is left behind on the card."""
    for process in list(_running):
        os.killpg(process.pid, signal.SIGKILL)
    raise SystemExit(128 + number)


def environment_of(path: list[str], *, dry: bool) -> dict[str, str]:
    """Return the environment of every part.

    Args:
        path: folders that come first on Python's path.
        dry: use no card, even if there is one.
    """
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu" if dry else "cuda",
    }
    for name, value in {"OMP_NUM_THREADS": threads, "MAX_JOBS": "8", "DS_SKIP_CUDA_CHECK": "1"}.items():
        environment.setdefault(name, value)
    if dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def importable(names: tuple[str, ...], environment: dict[str, str]) -> dict[str, str]:
    """Return each package's version, or why it cannot be imported, as found by a separate process.

    With torch, also the name of the "card", or "none".
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"importing {', '.join(names)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(names: list[str], known: dict[str, Part]) -> list[list[str]]:
    """Return the parts in groups that run at the same time."""
    groups: list[list[str]] = []
    for name in names:
        if known[name].beside and groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def run_part(
    name: str,
    part: Part,
    out: Path,
    environment: dict[str, str],
    packages: dict[str, str],
    *,
    until: float,
    dry: bool,
) -> dict[str, object]:
    """Run a part within the time left, with its output in a log; return the result."""
    lacking = {need: packages[need] for need in (*NEEDED, *part.needs)}
    lacking = {need: state for need, state in lacking.items() if state.startswith(ABSENT)}
    if lacking:
        return {"skipped": "; ".join(f"{need}: {state}" for need, state in lacking.items())}
    words = part.dry if dry else part.words
    if words is None:
        return {"skipped": "needs a card"}
    seconds = min(part.limit_s, until - time.time())
    if seconds < 10:
        return {"skipped": f"out of time: {seconds:.0f} s left"}
    begun = time.monotonic()
    with (out / f"{name.replace(' ', '_')}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment
            | {
                "SWAFT_BENCH_UNTIL": str(time.time() + seconds - 5),
                "SWAFT_BENCH_PARTIAL": str(out / "partial.jsonl"),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        ended = {}
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            ended = {"ended": f"at its limit of {seconds:.0f} s"}
        finally:
            _running.discard(process)
    # 5: pytest had no test to run.
    return {"exit code": 0 if code == 5 else code, "seconds": round(time.monotonic() - begun, 1), **ended}


if __name__ == "__main__":
    sys.exit(main())
