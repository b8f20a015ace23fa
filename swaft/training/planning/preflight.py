"""Checks a run before it starts: what its ranks would do, as far as no device and no other rank is needed.

Every rule is the one that the run itself follows, called here without a process group. Whether the devices of this
machine could do what is asked is not judged: the launch may be meant for another one. What has to be installed for
it (a tracker, a compiler for an optimizer on the host) is looked for here.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swaft.averaging.host.machine import lane_bytes
from swaft.averaging.rules import Plan
from swaft.errors import ConfigError
from swaft.training.checks.problems import Parts, Problems, without
from swaft.training.checks.recipe import Recipe, is_recipe, load_recipe, require_python
from swaft.training.checks.start import check_start
from swaft.training.config import AveragingConfig, NoiseConfig, TrainConfig, read_config
from swaft.training.config.values import settings
from swaft.training.launch.deepspeed_config import FilledConfig
from swaft.training.launch.deepspeed_extension import refuse_left_locks
from swaft.training.launch.fsdp2 import find_blocks
from swaft.training.launch.launcher import Launch, Script, read_launch, read_script
from swaft.training.models.build import ParameterCount, count_parameters
from swaft.training.planning.model import planned_model
from swaft.training.run.schedule import Schedule

SILENCED = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_save_16bit_model",
    "mixed_precision",
)
"""Entries of a launch file that a bare ``Accelerator()`` refuses beside a DeepSpeed file."""


@dataclass(frozen=True)
class Preflight:
    """What was found out about a run."""

    facts: dict[str, Any]
    """By part of the run (launch, batch, steps, averaging, noise, ds, data, rows, notes), plain values; a part that
    could not be made out is left out, and its problem is listed."""
    unchecked: list[str]
    """What was not looked at, and why."""
    problems: list[str]
    """Everything that stands against the run."""


class Looked(Parts):
    """What was found out of a launch line so far."""

    launch: Launch
    script: Script
    is_python: bool
    model: nn.Module
    """On tensors without data."""
    size: ParameterCount
    facts: dict[str, Any]
    """By part of the run."""


def check_run(words: Sequence[str]) -> Preflight:
    """Check the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
    """
    run, problems, unchecked = Looked(), Problems(), list[str]()
    run.facts = {}
    with problems:
        run.launch = read_launch(words)
    with problems:
        run.script = read_script(words)
    unasked = "settings, data and model: "
    path = Path(run.script.path) if hasattr(run, "script") and run.script.is_file else None
    with problems:
        run.is_python = path is not None and require_python(path) is None
    if path is None:
        unchecked.append(f"{unasked}there is no recipe to ask")
    elif not hasattr(run, "is_python"):
        unchecked.append(f"{unasked}{path} cannot be asked for them")
    elif is_recipe(path):
        with problems:
            _check_recipe(load_recipe(path), run, problems)
    else:
        unchecked.append(
            f"{unasked}{path} is not written as swaft's recipes are (it has no Config and prepare); only the "
            "launch line, its file and the stage in the DeepSpeed file were looked at"
        )
        with problems:
            _check_script(run.launch)
    if "launch" not in run.facts:
        with problems:
            run.facts["launch"] = _launch_facts(run.launch, None)
    known = {name: value for name, value in run.facts.items() if value is not None}
    return Preflight(known, unchecked, problems.found)


def _check_recipe(recipe: Recipe, run: Looked, problems: Problems) -> None:
    """Check what the recipe says, and put what there is to report into ``run.facts``, by part.

    Args:
        recipe: the recipe.
        run: with `launch` and `script`.
        problems: the list.
    """
    config, replaced = _read_settings(recipe, run.script, problems)
    with _notes() as notes:
        ready = recipe.prepare(config, problems)
        start = check_start(config, ready, run.launch.environ if hasattr(run, "launch") else None, problems)
    fake = FakeTensorMode()
    with problems, fake:  # what is wrong with its adapters shows here
        run.model = planned_model(config, copy.deepcopy(ready.model_config)).build()
        run.size = count_parameters(run.model)
    with problems, fake:
        ready.objective.prepare_model(run.model)
    with problems:
        if start.engine.fsdp2 is not None:
            find_blocks(run.model, start.engine.fsdp2)
    facts: dict[str, Callable[[], Any]] = {
        "launch": lambda: _launch_facts(run.launch, getattr(start, "precision", None)),
        "batch": lambda: _batch_facts(config.train, run.launch.world_size),
        "model": lambda: {"parameters": run.size.total, "trained": run.size.trainable},
        "steps": lambda: _step_facts(config.train, start.schedule, cuts_rows=ready.cuts_rows),
        "averaging": lambda: _averaging_facts(config.averaging, start.plan, run.size, run.launch.world_size),
        "noise": lambda: _noise_facts(config.noise, ready.objective, ready.model_config),
        "ds": lambda: _deepspeed_facts(start.engine.deepspeed),
        "data": lambda: {name: len(split) for name, split in ready.rows.items()},
        "rows": lambda: replaced or None,
        "notes": lambda: notes or None,
    }
    for part, find in facts.items():
        with problems:
            run.facts[part] = find()


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Context that collects what a run would log meanwhile: how rows and classes are taken."""
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


def _read_settings(recipe: Recipe, script: Script, problems: Problems) -> tuple[Any, list[str]]:
    """Read the recipe's configuration; a section with a faulty value in it is missing.

    Returns:
        The configuration, and which rows were put in the place of which.
    """
    read = read_config(recipe.config_class, script.arguments)
    problems.add(read.problems)
    known = settings(recipe.config_class)
    faulty = {name.split(".")[0] for fault in read.problems if (name := fault.split(":")[0]) in known}
    return without(read.config, faulty), read.replaced


def _check_script(launch: Launch) -> None:
    """Refuse what a bare ``Accelerator()`` refuses of the launch line.

    Raises:
        ConfigError: as accelerate would.
    """
    if launch.stage is None:
        return
    fields = launch.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    named = launch.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    silenced = [name for name in SILENCED if name in fields] if named != "none" else []
    if silenced:
        raise ConfigError(
            f"the launch file says {', '.join(silenced)} beside deepspeed_config_file {named}, which accelerate "
            "refuses in a script of your own (swaft's recipes take both): write it into that file; "
            "mixed_precision may also be given on the line (--mixed_precision bf16)"
        )
    refuse_left_locks(offloads_optimizer=False)


def _launch_facts(launch: Launch, precision: str | None) -> dict[str, Any]:
    return {
        "engine": launch.engine,
        "machines": launch.num_machines,
        "ranks": launch.world_size,
        "mixed_precision": precision,
    }


def _batch_facts(train: TrainConfig, world_size: int) -> dict[str, int]:
    per_device, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return {
        "per_device": per_device,
        "accumulation": accumulation,
        "ranks": world_size,
        "total": per_device * accumulation * world_size,
    }


def _step_facts(train: TrainConfig, schedule: Schedule, *, cuts_rows: bool) -> dict[str, Any]:
    given = train.max_steps > 0
    return {
        "epochs": None if given else train.num_train_epochs,
        "total": schedule.total_steps,
        "is_least": cuts_rows and not given,
        "warmup": schedule.warmup_steps,
        "schedule": schedule.kind,
        "learning_rate": schedule.peak,
    }


def _averaging_facts(
    averaging: AveragingConfig, plan: Plan | None, size: ParameterCount, world_size: int
) -> dict[str, Any]:
    if plan is None:
        return {"rule": "none"}
    owned = math.ceil(size.trainable / world_size)
    return {
        "rule": averaging.rule,
        "first_step": plan.first_step,
        "last_step": plan.step_of(plan.num_members - 1),
        "every": plan.every,
        "members": plan.num_members,
        "host_bytes_a_rank": lane_bytes(
            plan,
            owned,
            compensated=averaging.precision == "compensated",
            spilled=averaging.spill_dir is not None,
        ),
    }


def _noise_facts(noise: NoiseConfig, objective: Any, model_config: Any) -> dict[str, Any]:
    if noise.kind == "none":
        return {"kind": "none"}
    settings = objective.settings(generating=bool(model_config.is_encoder_decoder))
    return {"kind": noise.kind, "weight": noise.weight} | dataclasses.asdict(settings)


def _deepspeed_facts(filled: FilledConfig | None) -> list[dict[str, Any]] | None:
    if filled is None:
        return None
    return [{"key": key, "value": value, "source": source} for key, value, source in filled.rows]
