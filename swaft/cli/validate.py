r"""Checks a run before it starts, without a GPU: all problems at once, and what the run comes to.

    swaft validate --config_file launch/accelerate/zero3.yaml --num_processes 16 recipes/seq2seq.py \
        --config recipes/configs/seq2seq/e2e.yaml train.learning_rate=1e-4

That is the launch line with `swaft validate` in the place of `accelerate launch`. Nothing is started and nothing is
written; data, the model's configuration and its tokenizer are loaded. Whether this machine could do it is not
judged: the launch may be meant for another one.

  --json    print the same as JSON

Exit code: 0 without problems, 1 with some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swaft.training.planning.preflight import Preflight


def run(words: Sequence[str]) -> int:
    """Check the run that these words would launch, print what was found, and return the exit code."""
    import datasets  # only here: --help waits for no library

    from swaft.training.planning.preflight import check_run

    as_json = "--json" in words
    datasets.disable_progress_bars()  # rows are read fast, and the table is what there is to see
    found = check_run([word for word in words if word != "--json"])
    print(json.dumps(asdict(found), indent=2, default=str) if as_json else table(found))
    return 1 if found.problems else 0


def table(found: Preflight) -> str:
    """Return what was found as lines, each led by the part of the run that it is about."""
    rows = [
        (part, line)
        for part, tell in PARTS.items()
        if part in found.facts
        for line in tell(found.facts[part])
    ]
    rows += [("unchecked", sentence) for sentence in found.unchecked]
    rows += [("problem", problem) for problem in found.problems or ["none"]]
    return "\n".join(f"{part:<10} {line}" for part, line in rows)


def _launch(facts: dict[str, Any]) -> list[str]:
    machines, ranks, precision = facts["machines"], facts["ranks"], facts["mixed_precision"]
    where = f"{machines} machines x {ranks // machines} = " if machines > 1 else ""
    words = [f"{where}{_count(ranks, 'rank')}", facts["engine"]]
    words += [] if precision is None else ["fp32" if precision == "no" else precision]
    return [", ".join(words)]


def _batch(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['per_device']} per device x {facts['accumulation']} accumulation x "
        f"{_count(facts['ranks'], 'rank')} = {facts['total']:,}"
    ]


def _model(facts: dict[str, int]) -> list[str]:
    share = "" if facts["trained"] == facts["parameters"] else f", {facts['trained']:,} of them trained"
    return [f"{facts['parameters']:,} parameters{share}"]


def _steps(facts: dict[str, Any]) -> list[str]:
    epochs = "" if facts["epochs"] is None else f"{facts['epochs']:g} epochs = "
    least = "at least " if facts["is_least"] else ""
    return [
        f"{epochs}{least}{facts['total']:,} optimizer steps, warm-up {facts['warmup']:,}, {facts['schedule']} at "
        f"{facts['learning_rate']:g}"
    ]


def _averaging(facts: dict[str, Any]) -> list[str]:
    if facts["rule"] == "none":
        return ["none"]
    return [
        f"{facts['rule']}, steps {facts['first_step']:,} to {facts['last_step']:,}, every {facts['every']:,} -> "
        f"{facts['members']:,} weights; {facts['host_bytes_a_rank'] / 2**20:,.1f} MiB of host memory per rank"
    ]


def _noise(facts: dict[str, Any]) -> list[str]:
    if facts["kind"] == "none":
        return ["none"]
    size = f"{facts['sigma']:g}" + (" of the embeddings' RMS" if facts["relative"] else "")
    drawn = f"{facts['noise']} {size} on the embeddings" if facts["sigma"] else "two dropout masks"
    forwards = "2 forwards" if facts["passes"] == "two" else "1 forward of twice the rows"
    return [f"{facts['kind']}, {drawn}, weight {facts['weight']:g} -> {forwards} per micro-batch"]


def _deepspeed(facts: list[dict[str, Any]]) -> list[str]:
    width = max((len(row["key"]) for row in facts), default=0)
    return [f"{row['key']:<{width}}  {row['value']!s:<8}  ({row['source']})" for row in facts]


def _data(facts: dict[str, int]) -> list[str]:
    return [", ".join(f"{name} {_count(rows, 'row')}" for name, rows in facts.items()) + ", columns ok"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


PARTS: dict[str, Callable[[Any], list[str]]] = {
    "launch": _launch,
    "batch": _batch,
    "model": _model,
    "steps": _steps,
    "averaging": _averaging,
    "noise": _noise,
    "ds": _deepspeed,
    "data": _data,
    "rows": list,
    "notes": list,
}
