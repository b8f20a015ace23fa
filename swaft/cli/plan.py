r"""Predicts what a run takes on every rank, before it starts and without a GPU, for any number of ranks.

    swaft plan --config_file launch/accelerate/zero3.yaml --num_processes 16 recipes/seq2seq.py \
        --config recipes/configs/seq2seq/e2e.yaml

That is the launch line with `swaft plan` instead of `accelerate launch`. The model is built from its configuration
without any weights, and one of its steps is run on tensors without data. The numbers are for the rank with the most
memory, at the peak of each part of the run, with rows as long as the settings allow.

  --on_cpu              the ranks compute on the CPU, over gloo; default: on a GPU each
  --device_memory GIB   memory of a device, to say whether the run fits
  --host_memory GIB     memory of a machine, to say whether its ranks fit
  --step_seconds S      measured time of a training step, to say which share of it averaging takes
  --json                print the same as JSON

Lines starting with `problem` say what does not fit and what would help, lines with `refused` why the run itself
would refuse to start (`swaft validate` reports all such reasons).

Exit code: 0; 1 if something does not fit, or the run cannot be planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from swaft.cli import CommandParser, reading
from swaft.sizes import sized

if TYPE_CHECKING:
    from swaft.training.planning.plan import RunPlan


def run(words: Sequence[str]) -> int:
    """Plan the run that these words would launch, print the plan, and return the exit code."""
    options, line = _parser().parse_known_args(list(words))

    # here, so that --help does not wait for them
    from swaft.training.planning.plan import plan_recipe
    from swaft.training.run.progress import disable_progress_bars

    disable_progress_bars()
    device, host = options.device_memory, options.host_memory
    found = plan_recipe(
        line,
        on_cpu=options.on_cpu,
        device_bytes=device,
        host_bytes=host,
        step_seconds=options.step_seconds,
    )
    print(json.dumps(as_dict(found), indent=2) if options.json else table(found, device, host))
    return 1 if found.shortages else 0


def as_dict(found: RunPlan) -> dict[str, Any]:
    """Return the plan as plain values, with all memory in bytes."""
    totals = {
        "device_bytes": found.device_bytes,
        "host_bytes": found.host_bytes,
        "machine_bytes": found.machine_bytes,
        "ranks_a_machine": found.ranks_a_machine,
        "waits_for_averaging": found.averaging.waits if found.averaging else None,
    }
    return asdict(found) | totals


def table(found: RunPlan, device: int | None, host: int | None) -> str:
    """Return the plan as lines, each starting with its part of the run, compared with the memory there is."""
    return "\n".join(f"{part:<10} {line}" for part, line in _rows(found, device, host))


def _rows(found: RunPlan, device: int | None, host: int | None) -> Iterator[tuple[str, str]]:
    """Yield part and text of each line of the plan."""
    machines = f"{found.machines:,} machines x {found.ranks_a_machine} = " if found.machines > 1 else ""
    ranks = f"{machines}{found.world_size:,} {'CPU' if found.on_cpu else 'GPU'} rank"
    precision = "fp32" if found.precision == "no" else found.precision
    yield "launch", f"{ranks}{'s' * (found.world_size > 1)}, {found.engine}, {precision}"
    share = "" if found.trainable == found.parameters else f", {found.trainable:,} of them trained"
    yield "model", f"{found.parameters:,} parameters{share}"
    for phase in found.phases:
        places = [
            ("" if found.on_cpu else "device ", phase.device),
            ("" if found.on_cpu else "host ", phase.host),
        ]
        sizes = [f"{place}{sized(sum(rows.values()))}" for place, rows in places if rows]
        yield "memory", f"{phase.name}: {', '.join(sizes) or 'nothing to speak of'}"
        for place, rows in places:
            label = place and f"{place.strip()}: "
            yield from (
                ("memory", f"  {sized(size):>10}  {label}{name}") for name, size in rows.items() if size
            )
    yield from (("averaging", line) for line in _averaging_lines(found))
    if not found.on_cpu:
        yield "device", f"{sized(found.device_bytes)} a rank{_of(device)}"
    machine = f"{sized(found.machine_bytes)} a machine{_of(host)}"
    yield "host", f"{sized(found.host_bytes)} a rank, {machine}"
    sentences = {"note": found.notes, "refused": found.refused, "problem": found.shortages}
    yield from ((part, sentence) for part, lines in sentences.items() for sentence in lines)


def _averaging_lines(found: RunPlan) -> Iterator[str]:
    plan = found.averaging
    if plan is None:
        yield "none"
        return
    yield f"{plan.events:,} events from step {plan.first_step:,} of {plan.total_steps:,}, every {plan.every:,}"
    memory = f"{sized(plan.host_bytes)} of host memory, {sized(plan.pinned_bytes)} pinned"
    yield f"{plan.elements:,} elements per rank: {memory}, {sized(plan.copied_bytes)} copied per event"
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)}"
    yield (
        f"{plan.event_seconds:.3g} s of arithmetic per event on {threads}, in the background, at this machine's "
        "current rate"
    )
    if plan.share_of_step is None:
        yield "share of a step: not known; give a measured --step_seconds"
    else:
        waits = "training waits for it" if plan.waits else "training does not wait"
        yield f"share of the time between two events: {plan.share_of_step:.1%}, {waits}"


def _of(there: int | None) -> str:
    return "" if there is None else f" of {sized(there)}"


def _parser() -> CommandParser:
    parser = CommandParser("plan")
    for name in ("on_cpu", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    for name, read in (("device_memory", _gib), ("host_memory", _gib), ("step_seconds", _positive)):
        parser.add_argument(f"--{name}", type=reading(read, "a number above 0"))
    return parser


def _gib(word: str) -> int:
    """Read a number of GiB, as bytes."""
    return int(_positive(word) * 2**30)


def _positive(word: str) -> float:
    if not (value := float(word)) > 0:
        raise ValueError
    return value
