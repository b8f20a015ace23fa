r"""Checks a run before it starts, without a GPU: reports all problems at once, and the facts of the run.

    swaft validate --config_file launch/accelerate/zero3.yaml --num_processes 16 recipes/seq2seq.py \
        --config recipes/configs/seq2seq/e2e.yaml train.learning_rate=1e-4

That is the launch line with `swaft validate` instead of `accelerate launch`. Nothing is started and nothing is
written; data, the model's configuration and its tokenizer are loaded. Whether this machine could run it is not
checked: the launch may be for another one.

  --json    print the same as JSON

Exit code: 0 without problems, 1 with problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swaft.training.planning.preflight import Preflight


def run(words: Sequence[str]) -> int:
    """Check the run that these words would launch, print what was found, and return the exit code."""
    # here, so that --help does not wait for them
    from swaft.training.planning.preflight import check_run
    from swaft.training.run.progress import disable_progress_bars

    as_json = "--json" in words
    disable_progress_bars()  # rows are read fast, and the output should be just the table
    found = check_run([word for word in words if word != "--json"])
    print(json.dumps(asdict(found), indent=2, default=str) if as_json else table(found))
    return 1 if found.problems else 0


def table(found: Preflight) -> str:
    """Return what was found as lines, each starting with its part of the run."""
    rows = [*_rows(found.facts)]
    rows += [("unchecked", sentence) for sentence in found.unchecked]
    rows += [("problem", problem) for problem in found.problems or ["none"]]
    return "\n".join(f"{part:<10} {line}" for part, line in rows)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield part and text of every fact."""
    from swaft.training.models.build import noise_in_words  # here, so that --help does not wait for it

    if launch := facts.get("launch"):
        machines, ranks, precision = launch["machines"], launch["ranks"], launch["mixed_precision"]
        where = f"{machines} machines x {ranks // machines} = " if machines > 1 else ""
        words = [f"{where}{_count(ranks, 'rank')}", launch["engine"]]
        words += [] if precision is None else ["fp32" if precision == "no" else precision]
        yield "launch", ", ".join(words)
    if batch := facts.get("batch"):
        parts = f"{batch['per_device']} per device x {batch['accumulation']} accumulation"
        yield "batch", f"{parts} x {_count(batch['ranks'], 'rank')} = {batch['total']:,}"
    if model := facts.get("model"):
        is_whole = model["trained"] == model["parameters"]
        share = "" if is_whole else f", {model['trained']:,} of them trained"
        yield "model", f"{model['parameters']:,} parameters{share}"
    if steps := facts.get("steps"):
        epochs = "" if steps["epochs"] is None else f"{steps['epochs']:g} epochs = "
        total = f"{'at least ' if steps['is_least'] else ''}{steps['total']:,} optimizer steps"
        rate = f"{steps['schedule']} at {steps['learning_rate']:g}"
        yield "steps", f"{epochs}{total}, warmup {steps['warmup']:,}, {rate}"
    if averaging := facts.get("averaging"):
        yield "averaging", _averaging(averaging)
    if noise := facts.get("noise"):
        yield "noise", noise_in_words(noise)
    deepspeed = facts.get("ds", [])
    width = max((len(row["key"]) for row in deepspeed), default=0)
    yield from (("ds", f"{row['key']:<{width}}  {row['value']!s:<8}  ({row['source']})") for row in deepspeed)
    if data := facts.get("data"):
        rows = ", ".join(f"{name} {_count(number, 'row')}" for name, number in data.items())
        yield "data", "; ".join(filter(None, (rows, facts.get("columns"))))
    for part in ("rows", "notes"):
        yield from ((part, sentence) for sentence in facts.get(part, ()))


def _averaging(facts: dict[str, Any]) -> str:
    if facts["rule"] == "none":
        return "none"
    steps = f"steps {facts['first_step']:,} to {facts['last_step']:,}, every {facts['every']:,}"
    memory = f"{facts['host_bytes_a_rank'] / 2**20:,.1f} MiB of host memory per rank"
    return f"{facts['rule']}, {steps} -> {facts['members']:,} weights; {memory}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
