"""Memory that `swaft average` takes: 20 checkpoints of a model with a billion parameters, within 1 GiB.

    python -m benchmarks.soup_memory            # about 10 minutes on 2 busy cores, 8 GB of disk where TMPDIR says
    python -m benchmarks.soup_memory --quick    # a tiny model; writes nothing without --out

The vocabulary is as large as those of multilingual models, so that a single tensor has 2 GiB. The checkpoints are
one set of random weights under many names (symbolic links), read in full for each. What counts is the anonymous
memory of the process (RssAnon in /proc, sampled every few milliseconds): the rest is file pages, which the
system can reclaim at any time. Writes benchmarks/results/soup.json, and prints a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.measuring import memory_of
from swaft.storage import Spec, write_tensors

COUNTS = (2, 20)
BAR = 1 << 30
PIECE = 1 << 22

PROGRAM = "import sys; from swaft.cli.average import run; print('begun', flush=True); run(sys.argv[1:])"


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Bytes and seconds by number of checkpoints."""
    shapes = model(vocabulary=1000, width=64, layers=2) if quick else model(524_288, 1024, 37)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "weights", shapes)
        found = {str(count): average(Path(folder), count) for count in COUNTS}
    return {
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "largest tensor bytes": max(4 * torch.Size(shape).numel() for shape in shapes.values()),
        "bar for peak anonymous bytes": BAR,
        "by checkpoints": found,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """One line per number of checkpoints."""
    return [
        (
            f"{count} checkpoints of {result['parameters']:,} parameters",
            f"anonymous {figures['peak anonymous bytes'] / 2**20:,.0f} MiB at most",
            f"{figures['anonymous bytes before'] / 2**20:,.0f} MiB before",
            f"{figures['seconds']:.0f} s",
        )
        for count, figures in result["by checkpoints"].items()
    ]


def model(vocabulary: int, width: int, layers: int) -> dict[str, list[int]]:
    """Shapes of an encoder's weights, by name."""
    shapes = {"embeddings.weight": [vocabulary, width]}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.attention.{part}.weight": [width, width] for part in ("q", "k", "v", "o")}
        shapes |= {f"{at}.up.weight": [4 * width, width], f"{at}.down.weight": [width, 4 * width]}
        shapes |= {f"{at}.norm.weight": [width], f"{at}.norm.bias": [width]}
    return shapes


def write(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A Hugging Face folder of random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Encoder"], "dtype": "float32"}))
    piece = torch.randn(PIECE, generator=torch.Generator().manual_seed(0))
    specs = {name: Spec(torch.float32, tuple(shape)) for name, shape in shapes.items()}

    def values(name: str) -> Iterator[torch.Tensor]:
        for start in range(0, specs[name].numel, PIECE):
            yield piece[: min(PIECE, specs[name].numel - start)]

    write_tensors(folder / "model.safetensors", specs, values)


def average(folder: Path, count: int) -> dict[str, float]:
    """Average this many checkpoints in a separate process, and watch its memory.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    inputs = [folder / f"in-{count}-{number}" for number in range(count)]
    for path in inputs:
        path.symlink_to(folder / "weights")
    words = [*map(str, inputs), "--output", str(folder / f"out-{count}")]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    before = peak = memory_of("RssAnon", process.pid)
    begun = time.perf_counter()
    while process.poll() is None:
        with suppress(KeyError):  # it has ended just now
            peak = max(peak, memory_of("RssAnon", process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - begun
    lines += process.stdout.readlines()
    if process.returncode:
        raise RuntimeError("".join(lines[-20:]))
    for path in (folder / f"out-{count}").iterdir():
        path.unlink()
    return {
        "peak anonymous bytes": peak,
        "anonymous bytes before": before,
        "seconds": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    command.run("soup", {"memory": sys.modules[__name__]}, arguments, about=__doc__)


if __name__ == "__main__":
    main()
