"""What an averaging event costs on CPU ranks, next to other ways to average the same model in the same run."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.averaging_arithmetic import usable_cores
from benchmarks.ranks import run_ranks

ENGINES = ("ddp", "zero2", "zero3")
SMALL_BERT = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12}  # 30 million elements
TINY_BERT = {
    "vocab_size": 100,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
REPEATS = {1: (8, 6), 2: (6, 5), 4: (5, 3)}
"""By ranks: rounds of events, and pairs of blocks. Steps of many ranks on few cores take long."""
TIMEOUT_S = 400.0


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Every engine on 1, 2 and 4 ranks."""
    cores = usable_cores()
    missing = importlib.util.find_spec("deepspeed") is None
    engines = ENGINES[:1] if missing else ENGINES
    by_ranks = {}
    for ranks, (rounds, pairs) in ({2: (1, 1)} if quick else REPEATS).items():
        threads = cores if ranks == 1 else 1
        settings = {
            "engines": engines,
            "model": TINY_BERT if quick else SMALL_BERT,
            "batch": [2, 8] if quick else [4, 32],
            "rounds": rounds,
            "pairs": pairs,
            "steps": 2,
        }
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            run_ranks(
                "benchmarks.averaging_worker", json.dumps(settings), str(results),
                ranks=ranks, threads=threads, timeout_s=TIMEOUT_S,
            )  # fmt: skip
            found = json.loads(results.read_text())
        found |= {name: {"skipped": "DeepSpeed is not installed"} for name in ENGINES[len(engines) :]}
        by_ranks[str(ranks)] = {
            "ranks": ranks,
            "cores": cores,
            "oversubscribed": ranks * threads > cores,
            "engines": found,
        }
    return {
        "model": TINY_BERT if quick else SMALL_BERT,
        "note": (
            "Seconds are those of the slowest rank. 'total' is from the call until the average holds the member; "
            "'blocking' is what the training thread stands still, which for swaft is measured while steps follow "
            "each other. Everything shares the cores with training here, so step ratios on a CPU are for "
            "information; where 'oversubscribed' is true, ranks also share cores with each other."
        ),
        "by ranks": by_ranks,
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for ranks, at in result["by ranks"].items():
        for engine, found in at["engines"].items():
            lines += engine_rows(f"{ranks} ranks, {engine}", found)
    return lines


def engine_rows(head: str, found: dict) -> list[Sequence[object]]:
    """The printed table of one engine."""
    if "skipped" in found:
        return [(head, found["skipped"])]
    lines: list[Sequence[object]] = [
        (f"{head}: training step", f"{found['training step s']['median']:.4f} s")
    ]
    for name, arm in found["averages"].items():
        if "skipped" in arm:
            lines.append((f"{head}: {name}", "skipped"))
            continue
        lines.append(
            (
                f"{head}: {name}",
                f"blocking {arm['blocking s']['median']:.5f} s ({arm['blocking / step']:.1%})",
                f"total {arm['total s']['median']:.5f} s",
            )
        )
    ratio = found["paired steps"]["averaged / bare"]
    lines.append(
        (f"{head}: averaged / bare step", f"{ratio['median']:.4f}", f"quartiles {ratio['quartiles']}")
    )
    return lines
