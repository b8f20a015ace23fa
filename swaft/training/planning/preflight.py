"""Checks a run before it starts: everything that can be checked without a device or another rank.

The checks are the ones of the run itself, called here without a process group. Whether this machine's devices are
sufficient is not checked: the launch may be for another machine. What has to be installed for it (a tracker, a
compiler for an optimizer on the host) is checked here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from swaft.averaging.host.machine import lane_bytes
from swaft.averaging.rules import Readout, rule_name
from swaft.errors import ConfigError
from swaft.training.checks import (
    Parts,
    Prepared,
    Problems,
    Start,
    check_start,
    read_recipe,
)
from swaft.training.config import read_config
from swaft.training.config.load import leaders
from swaft.training.config.values import settings
from swaft.training.launch.deepspeed_config import named_file
from swaft.training.launch.deepspeed_extension import refuse_left_locks
from swaft.training.launch.fsdp2 import find_blocks
from swaft.training.launch.launcher import Launch, Script, read_launch, read_script
from swaft.training.models.build import ParameterCount, count_parameters, noise_facts
from swaft.training.models.pretrained import with_checkpointing
from swaft.training.planning.step import OnPaper, planned_model

WholeT = TypeVar("WholeT")

SILENCED = (
    *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "zero3_save_16bit_model"),
    *("offload_optimizer_device", "offload_param_device", "mixed_precision"),
    *("offload_optimizer_nvme_path", "offload_param_nvme_path"),
)
"""Entries of a launch file that a bare ``Accelerator()`` refuses together with a DeepSpeed file."""


@dataclass(frozen=True)
class Preflight:
    """The results of the checks of a run."""

    facts: dict[str, Any]
    """Plain values, by part of the run (the keys of `FACTS`)."""
    unchecked: list[str]
    """What was not checked, and why."""
    problems: list[str]
    """Everything that keeps the run from starting."""


class Looked(Parts):
    """What is known about a launch line so far."""

    launch: Launch
    script: Script
    config: Any
    """The recipe's configuration, without sections that have a faulty value."""
    replaced: list[str]
    """Which rows or choices replaced which settings."""
    notes: list[str]
    """What a run would log about how it reads rows and classes."""
    ready: Prepared
    start: Start
    model: nn.Module
    """The model, on tensors without data."""
    size: ParameterCount


def check_run(words: Sequence[str]) -> Preflight:
    """Check the run that ``accelerate launch`` would start with these words."""
    run, problems, facts = Looked(), Problems(), dict[str, Any]()
    with problems:
        run.launch = read_launch(words)
    with problems:
        run.script = read_script(words)
    unasked = "there is no recipe to ask"
    if hasattr(run, "script") and run.script.is_file:
        path = run.script.path
        unasked = f"{path} cannot be asked for them"
        with problems:
            recipe = read_recipe(Path(path))
            unasked = (
                f"{path} is not written as swaft's recipes are (it has no Config and prepare); only the launch "
                "line, its file and the stage in the DeepSpeed file were checked"
            )
            if recipe is None:
                _check_script(run.launch)
            else:
                unasked = ""
                _check_recipe(recipe, run, problems)
    unchecked = [f"settings, data and model: {unasked}"] if unasked else []
    if problems.skipped:
        unknown = f"whatever needs what the recipe's prepare does not set: {', '.join(problems.skipped)}"
        solvable = "whatever depends on the problems; validate again once they are solved"
        unchecked.append(solvable if problems.found else unknown)
    for part, find in FACTS.items():
        with problems:
            facts[part] = find(run)
    known = {name: value for name, value in facts.items() if value is not None}
    return Preflight(known, unchecked, problems.found)


def _check_recipe(recipe: Any, run: Looked, problems: Problems) -> None:
    """Check a recipe's settings and everything they lead to, and add the results to ``run``."""
    read = read_config(recipe.Config, run.script.arguments)
    problems.add(read.problems)
    faulty = {name.split(".")[0] for name in leaders(read.problems) & settings(recipe.Config).keys()}
    run.config, run.replaced = without(read.config, faulty), read.replaced
    with _notes() as run.notes:
        ready = run.ready = recipe.prepare(run.config, problems)
        environ = run.launch.environ if hasattr(run, "launch") else None
        run.start = check_start(run.config, ready, environ, problems)
    fake = OnPaper()
    with problems, fake:  # problems with adapters appear here
        run.model = planned_model(run.config, copy.deepcopy(ready.model_config)).build()
        run.size = count_parameters(run.model)
    with problems, fake:
        with_checkpointing(run.model, run.config.train.gradient_checkpointing)
    with problems, fake:
        ready.objective.prepare_model(run.model)
    with problems:
        if run.start.engine.fsdp2 is not None:
            find_blocks(run.model, run.start.engine.fsdp2)


def without(whole: WholeT, names: Collection[str]) -> WholeT:
    """Return a copy of an object, of a subclass of its class, without the attributes of these names."""
    kind = type(whole)
    some: Any = object.__new__(type(kind.__name__, (Parts, kind), {}))
    vars(some).update({name: value for name, value in vars(whole).items() if name not in names})
    return some


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Context that collects what a run would log meanwhile: how it reads rows and classes."""
    notes: list[str] = []
    handler, root = logging.Handler(), logging.getLogger("swaft")
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    before = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    try:
        yield notes
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        root.propagate = before[1]


def _check_script(launch: Launch) -> None:
    """Refuse a launch line that a bare ``Accelerator()`` would refuse.

    Raises:
        ConfigError: for what accelerate would refuse.
    """
    if launch.stage is None:
        return
    fields = launch.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    named = named_file(launch.environ)
    silenced = [name for name in SILENCED if name in fields]
    if silenced and named is not None:
        raise ConfigError(
            f"the launch file sets {', '.join(silenced)} next to deepspeed_config_file {named}, which accelerate "
            "refuses in a script of your own (swaft's recipes take both): write it into that file; "
            "mixed_precision may also be given on the command line (--mixed_precision bf16)"
        )
    refuse_left_locks(offloads_optimizer=False)


def _launch_facts(run: Looked) -> dict[str, Any]:
    launch, start = run.launch, getattr(run, "start", None)
    ranks = {"engine": launch.engine, "machines": launch.num_machines, "ranks": launch.world_size}
    return ranks | {"mixed_precision": getattr(start, "precision", None)}


def _batch_facts(run: Looked) -> dict[str, int]:
    train, ranks = run.config.train, run.launch.world_size
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    total = rows * accumulation * ranks
    return {"per_device": rows, "accumulation": accumulation, "ranks": ranks, "total": total}


def _step_facts(run: Looked) -> dict[str, Any]:
    train, schedule = run.config.train, run.start.schedule
    return {
        "epochs": None if train.max_steps > 0 else train.num_train_epochs,
        "total": schedule.total_steps,
        "is_least": run.start.may_be_longer,
        "warmup": schedule.warmup_steps,
        "schedule": schedule.kind,
        "learning_rate": schedule.peak,
    }


def _averaging_facts(run: Looked) -> dict[str, Any]:
    averaging, plan = run.config.averaging, run.start.plan
    if plan is None:
        return {"rule": "none"}
    _, members = plan.resolved(plan.num_members, Readout())
    owned, spilled = -(-run.size.trainable // run.launch.world_size), averaging.spill_dir is not None
    compensated = averaging.precision == "compensated"
    return {
        "rule": rule_name(plan),
        "first_step": plan.step_of(members[0]),
        "last_step": plan.step_of(members[-1]),
        "every": plan.every,
        "members": len(members),
        "host_bytes_a_rank": lane_bytes(plan, owned, compensated=compensated, spilled=spilled),
    }


def _deepspeed_facts(run: Looked) -> list[dict[str, Any]] | None:
    filled, names = run.start.engine.deepspeed, ("key", "value", "source")
    return None if filled is None else [dict(zip(names, row, strict=True)) for row in filled.rows]


FACTS: dict[str, Callable[[Looked], Any]] = {
    "launch": _launch_facts,
    "batch": _batch_facts,
    "model": lambda run: {"parameters": run.size.total, "trained": run.size.trainable},
    "steps": _step_facts,
    "averaging": _averaging_facts,
    "noise": lambda run: noise_facts(run.ready.objective, run.model),
    "ds": _deepspeed_facts,
    "data": lambda run: {name: len(split) for name, split in run.ready.rows.items()},
    "columns": lambda run: str(run.ready.columns),
    "rows": lambda run: run.replaced or None,
    "notes": lambda run: run.notes or None,
}
"""What is reported for each part of a run; a part that could not be determined is left out, its problem listed."""
