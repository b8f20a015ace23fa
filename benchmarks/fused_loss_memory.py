"""Peak memory of forward and backward for every way to compute the loss.

On a CPU each arm runs in its own process, which calls it once to settle and again with the peak reset:

    python -m benchmarks.fused_loss_memory '{"arm": "plain", "shape": [1024, 512, 32128]}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.deadline import within
from benchmarks.fused_loss_clock import release, short
from benchmarks.fused_loss_rivals import (
    COMPILED,
    FOREIGN,
    LIGER,
    PLAIN,
    SWAFT,
    Arm,
    Shape,
    arms,
    make_operands,
)
from benchmarks.fused_loss_speed import dtype_of
from benchmarks.measuring import CLEAR, forget_peak, memory_of
from benchmarks.ranks import ROOT

CPU_SHAPE = Shape(1024, 512, 32128)
GPU_SHAPES = (Shape(8192, 1024, 250112), Shape(8192, 4096, 128256))
QUICK_SHAPE = Shape(512, 16, 8192)
OVER_INPUTS, OVER_BOTH = "bytes over inputs", "bytes over inputs and gradients"
CPU_BAR = {"shape": CPU_SHAPE.name, "figure": f"{PLAIN} / {SWAFT}, {OVER_INPUTS}", "at least": 4.0}
GPU_BAR = {"shape": GPU_SHAPES[0].name, "figure": f"{SWAFT}, {OVER_BOTH}", "at most": 3e9}
TIMEOUT_S = 150.0
LARGE_BLOCK = 1 << 20
"""Blocks from this size on are allocated from and returned to the kernel directly, so resident memory is in use."""


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Every arm at the shape of the bar; on a GPU also at a wider one."""
    if device == "cuda":
        shapes = (QUICK_SHAPE,) if quick else GPU_SHAPES
        names = (SWAFT, PLAIN, *(() if quick else (COMPILED,)), *LIGER)
        by_shape = {shape.name: _on_gpu(shape, names) for shape in shapes}
    else:
        shape = QUICK_SHAPE if quick else CPU_SHAPE
        names = (SWAFT, PLAIN, *(() if quick else (COMPILED,)))
        by_shape = {shape.name: {name: _in_process_of_its_own(name, shape) for name in names}}
    for found in by_shape.values():
        mark = found[PLAIN]
        for arm in found.values():
            if "skipped" not in arm and "skipped" not in mark:
                arm[f"{PLAIN} / this"] = {key: mark[key] / arm[key] for key in (OVER_INPUTS, OVER_BOTH)}
    return {
        "dtype": str(dtype_of(device)),
        "threads": torch.get_num_threads(),
        "bar": CPU_BAR if device == "cpu" else GPU_BAR,
        "by shape": by_shape,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for shape, found in result["by shape"].items():
        for name, arm in found.items():
            if "skipped" in arm:
                lines.append((f"{shape}: {name}", f"skipped: {arm['skipped']}"))
                continue
            less = arm.get(f"{PLAIN} / this", {}).get(OVER_INPUTS, float("nan"))
            lines.append(
                (
                    f"{shape}: {name}",
                    f"{arm[OVER_INPUTS] / 1e9:.3f} GB over inputs",
                    f"{arm[OVER_BOTH] / 1e9:.3f} over gradients too",
                    f"plain takes {less:.2f} x of it",
                )
            )
    bar = result["bar"]
    lines.append((f"bar at {bar['shape']}", bar["figure"], *list(bar.items())[-1]))
    return lines


def main(argument: str) -> None:
    """Measure one arm on the CPU in this process, and print the figures as JSON."""
    asked = json.loads(argument)
    call = _arm(asked["arm"], Shape(*asked["shape"]), device="cpu")
    if isinstance(call, str):
        print(json.dumps({"skipped": call}))
        return
    call()
    forget_peak()
    before = memory_of("VmRSS")
    gradients = _nbytes(call())
    print(json.dumps(_figures(memory_of("VmHWM") - before, gradients)))


def _in_process_of_its_own(name: str, shape: Shape) -> dict[str, object]:
    if not os.access(CLEAR, os.W_OK):
        return {"skipped": f"the peak of resident memory is set back through {CLEAR}, which is not there"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.fused_loss_memory",
        json.dumps({"arm": name, "shape": shape}),
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {TIMEOUT_S:.0f} s"}
    except subprocess.CalledProcessError as error:
        if name not in FOREIGN:
            raise RuntimeError(f"memory of {name} ended with {error.returncode}:\n{error.stderr}") from error
        return {"skipped": f"ended with {error.returncode}: {error.stderr.strip().splitlines()[-1:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _on_gpu(shape: Shape, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    return {
        name: within(f"memory {shape.name}, {name}", 5.0, lambda name=name: _one_on_gpu(name, shape))
        for name in names
    }


def _one_on_gpu(name: str, shape: Shape) -> dict[str, object]:
    release()
    try:
        call = _arm(name, shape, device="cuda")
        if isinstance(call, str):
            return {"skipped": call}
        call()
        release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = _nbytes(call())
        return _figures(torch.cuda.max_memory_allocated() - before, gradients)
    except Exception as error:
        if name not in FOREIGN:
            raise
        return {"skipped": short(error)}


def _arm(name: str, shape: Shape, *, device: str) -> Arm | str:
    return arms(make_operands(shape, dtype=dtype_of(device), device=device), (name,))[name]


def _figures(peak: int, gradients: int) -> dict[str, object]:
    return {OVER_INPUTS: peak, "bytes of gradients": gradients, OVER_BOTH: peak - gradients}


def _nbytes(step: object) -> int:
    return sum(gradient.nbytes for gradient in step.gradients if gradient is not None)


if __name__ == "__main__":
    main(sys.argv[1])
