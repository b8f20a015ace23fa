"""How fast the averages are saved, including hashing, compared with what disk and hash allow on the same machine.

    python -m benchmarks.state_save                      # a minute; 0.6 GB in the folder of --folder, deleted after

Rounds alternate: the same bytes written plainly to one file and synced, hashed in memory in blocks on all cores,
and saved by `WeightAverager.save_state`. The bar is 70 % of the slower of the first two, in the median round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import swaft
from benchmarks.environment import environment
from swaft.storage import BLOCK_BYTES, BlockHasher

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "state_save.json"
BAR = 0.70


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=100_000_000, help="of the average; 6 bytes each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="on the disk to measure")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="state-save-", dir=options.folder))
    try:
        rates = measure(folder, options.elements, options.rounds)
    finally:
        shutil.rmtree(folder)
    shares = [
        save / min(write, digest)
        for write, digest, save in zip(rates["write"], rates["hash"], rates["save"], strict=True)
    ]
    result = {
        "environment": environment(),
        "bytes": 6 * options.elements,
        "MB a second": {name: [round(rate / 1e6) for rate in found] for name, found in rates.items()},
        "share of the slower of write and hash": [round(share, 3) for share in shares],
        "median share": round(statistics.median(shares), 3),
        "bar": BAR,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "environment"})


def measure(folder: Path, elements: int, rounds: int) -> dict[str, list[float]]:
    """Bytes per second of each way, by round."""
    averager = averaged(elements)
    data = np.random.default_rng(0).integers(0, 256, 6 * elements, dtype=np.uint8)
    ways: dict[str, Callable[[Path], None]] = {
        "write": lambda path: write(path, data),
        "hash": lambda path: digest(data),
        "save": averager.save_state,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            path = folder / f"{name}-{number}"
            os.sync()
            begun = time.perf_counter()
            way(path)
            seconds = time.perf_counter() - begun
            if number:  # the first warms up
                rates[name].append(len(data) / seconds)
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
    return rates


def averaged(elements: int) -> swaft.WeightAverager:
    """An average of two members of one large parameter."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(elements))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=2)
    for seed in range(2):
        model.weight.grad = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        averager.step()
    optimizer.zero_grad()
    averager.wait()
    return averager


def write(path: Path, data: np.ndarray) -> None:
    """Write plainly, and wait until it is on the disk."""
    with path.open("wb", buffering=0) as file:
        for first in range(0, len(data), BLOCK_BYTES):
            file.write(data[first : first + BLOCK_BYTES])
        os.fsync(file.fileno())


def digest(data: np.ndarray) -> None:
    """Hash in memory, as for the manifest."""
    with BlockHasher() as hasher:
        hasher.update(data)
        hasher.hexdigest()


if __name__ == "__main__":
    main()
