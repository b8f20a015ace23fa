"""Checks a run before it starts: what its ranks would do, as far as no device and no other rank is needed.

Every rule is the one that the run itself follows, called here without a process group. Whether this machine could
do what is asked is not judged: the launch may be meant for another one.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swaft.averaging.host.memory import lane_bytes
from swaft.averaging.rules import Plan, Rule
from swaft.config import AveragingConfig, NoiseConfig, TrainConfig, read_config, to_yaml
from swaft.config.leaves import leaves
from swaft.planning.model import planned_model
from swaft.training.build import ParameterCount, count_parameters
from swaft.training.launch.accelerator import resolve_deepspeed, resolve_precision
from swaft.training.launch.deepspeed_config import FilledConfig
from swaft.training.launch.deepspeed_extension import reason_not_to_build, refuse_stale_lock, use_environment
from swaft.training.launch.fsdp2 import resolve_fsdp2
from swaft.training.launch.launcher import Launch, Script, read_launch, read_script
from swaft.training.pretrained import hidden_size
from swaft.training.problems import MISSING, Problems
from swaft.training.recipe import Recipe, is_recipe, load_recipe, require_python
from swaft.training.refusals import refuse_compilation
from swaft.training.run.folder import refuse_used
from swaft.training.schedule import Schedule, build_schedule, planned_steps


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


def check_run(words: Sequence[str]) -> Preflight:
    """Check the run that ``accelerate launch`` would start with these words.

    Args:
        words: the command line after ``accelerate launch``.
    """
    problems, facts, unchecked = Problems(), dict[str, Any](), list[str]()
    launch = problems.of(read_launch, words)
    script = problems.of(read_script, words)
    if script is MISSING or not script.is_file:
        unchecked.append("settings, data and model: there is no recipe to ask")
    elif problems.of(require_python, Path(script.path)) is MISSING:
        unchecked.append(f"settings, data and model: {script.path} cannot be asked for them")
    elif is_recipe(Path(script.path)):
        facts = _check_recipe(script, launch, problems)
    else:
        unchecked.append(
            f"settings, data and model: {script.path} is not written as swaft's recipes are (it has no Config and "
            "prepare); only the launch line, its file and the stage in the DeepSpeed file were looked at"
        )
    if "launch" not in facts:
        facts["launch"] = problems.of(_launch_facts, launch, None)
    problems.of(_refuse_stale_lock, launch)
    known = {name: value for name, value in facts.items() if value is not MISSING and value is not None}
    return Preflight(known, unchecked, problems.found)


def _check_recipe(script: Script, launch: Launch, problems: Problems) -> dict[str, Any]:
    """Check what the recipe says; returns what there is to tell, by part."""
    recipe = problems.of(load_recipe, Path(script.path))
    if recipe is MISSING:
        return {}
    config, replaced = _read_settings(recipe, script, problems)
    with _notes() as notes:
        ready = recipe.prepare(config, problems)
    problems.of(refuse_compilation, launch.environ)
    precision = problems.of(resolve_precision, config.train, launch.environ)
    width = problems.of(hidden_size, ready.model_config)
    filled = problems.of(
        resolve_deepspeed,
        config.train,
        launch.environ,
        precision=precision,
        hidden_size=None if width is MISSING else width,  # decides on the sizes of buckets alone
    )
    problems.of(resolve_fsdp2, launch.environ, precision=precision)
    problems.of(
        refuse_used,
        config.train.output_dir,
        resume=config.train.resume_from_checkpoint,
        config_yaml=_as_yaml(config),
    )
    total_steps = problems.of(_given_steps, config.train)
    if total_steps is None:
        total_steps = problems.of(_count_steps, config.train, ready.rows, launch.world_size)
    averaging = ready.rule is not None
    schedule = problems.of(build_schedule, config.train, total_steps=total_steps, averaging=averaging)
    plan = problems.of(_plan, ready.rule, total_steps)
    fake = FakeTensorMode()
    model = problems.of(_empty_model, config, ready.model_config, fake)
    size = problems.of(count_parameters, model)
    problems.of(_fit_objective, ready.objective, model, fake)
    return {
        "launch": problems.of(_launch_facts, launch, None if precision is MISSING else precision),
        "batch": problems.of(_batch_facts, config.train, launch.world_size),
        "model": problems.of(_model_facts, size),
        "steps": problems.of(_step_facts, config.train, schedule, cuts_rows=ready.cuts_rows),
        "averaging": problems.of(_averaging_facts, config.averaging, plan, size, launch.world_size),
        "noise": problems.of(_noise_facts, config.noise, ready.objective, ready.model_config),
        "ds": problems.of(_deepspeed_facts, filled),
        "data": problems.of(_data_facts, ready.rows),
        "rows": replaced or None,
        "notes": notes or None,
    }


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
    known = leaves(recipe.config_class)
    faulty = {name.split(".")[0] for fault in read.problems if (name := fault.split(":")[0]) in known}
    return dataclasses.replace(read.config, **dict.fromkeys(faulty, MISSING)), read.replaced


def _as_yaml(config: Any) -> str:
    """Write the configuration as a run keeps it; missing where a section of it is."""
    sections = [getattr(config, section.name) for section in dataclasses.fields(config)]
    return MISSING if any(section is MISSING for section in sections) else to_yaml(config)


def _refuse_stale_lock(launch: Launch) -> None:
    """Refuse a left-behind lock that DeepSpeed would wait for, where this machine has no GPU to do without."""
    if launch.stage is not None and reason_not_to_build() is None:
        use_environment()
        refuse_stale_lock()


def _given_steps(train: TrainConfig) -> int | None:
    return train.max_steps if train.max_steps > 0 else None


def _count_steps(train: TrainConfig, rows: Mapping[str, Sized], world_size: int) -> int:
    return planned_steps(train, num_rows=len(rows["train"]), world_size=world_size)


def _plan(rule: Rule | None, total_steps: int) -> Plan | None:
    return None if rule is None else rule.plan(total_steps)


def _empty_model(config: Any, model_config: Any, fake: FakeTensorMode) -> nn.Module:
    """Build the model on tensors without data; what is wrong with its adapters shows here."""
    with fake:
        return planned_model(config, copy.deepcopy(model_config)).build()


def _fit_objective(objective: Any, model: nn.Module, fake: FakeTensorMode) -> None:
    """Refuse an objective that cannot be had with the model."""
    with fake:
        objective.prepare_model(model)


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
    given = _given_steps(train) is not None
    return {
        "epochs": None if given else train.num_train_epochs,
        "total": schedule.total_steps,
        "is_least": cuts_rows and not given,
        "warmup": schedule.warmup_steps,
        "schedule": schedule.kind,
        "learning_rate": schedule.peak,
    }


def _model_facts(size: ParameterCount) -> dict[str, int]:
    return {"parameters": size.total, "trained": size.trainable}


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


def _data_facts(rows: Mapping[str, Sized]) -> dict[str, int]:
    return {name: len(split) for name, split in rows.items()}
