"""What every run is checked for before it starts: one table, which the run, `swaft validate` and `swaft plan` read.

What a recipe checks of its own task stands in its ``prepare``, which all three call as well. So a rule belongs into
one of these two places, and is known to all.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import get_available_trackers

from swaft.averaging.rules import Plan, Rule
from swaft.errors import ConfigError
from swaft.training.checks.problems import MISSING, Problems
from swaft.training.checks.refusals import (
    keep_all_layers,
    refuse_compilation,
    refuse_parallelism,
    refuse_routing,
)
from swaft.training.config import AdapterConfig, NoiseConfig, TrackConfig, TrainConfig, plan_rule, to_yaml
from swaft.training.launch.accelerator import (
    EngineSettings,
    partitions_at_load,
    resolve_deepspeed,
    resolve_precision,
)
from swaft.training.launch.deepspeed_config import FilledConfig, offloads_optimizer
from swaft.training.launch.deepspeed_extension import refuse_left_locks
from swaft.training.launch.fsdp2 import obey_fsdp2, resolve_fsdp2
from swaft.training.models.pretrained import hidden_size
from swaft.training.run.checkpoints import AVERAGE, checkpoint_on_paper
from swaft.training.run.folder import refuse_used
from swaft.training.run.record import (
    RunRecord,
    batches_read,
    require_averages,
    require_same_engine,
    require_same_run,
)
from swaft.training.run.schedule import Schedule, build_schedule, planned_steps

Ready = TypeVar("Ready")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the checks found out; a field is `MISSING` where a problem stands in its way."""

    precision: str
    """``no``, ``bf16`` or ``fp16``."""
    engine: EngineSettings
    """What accelerate is started with."""
    total_steps: int
    """Optimizer steps of the run, told from its rows."""
    schedule: Schedule
    """Learning rate by step."""
    plan: Plan | None
    """What is averaged when; None: nothing is averaged."""


def start_of(config: Any, prepare: Callable[[Any, Problems], Ready]) -> tuple[Ready, Start]:
    """Find what a run needs and can be wrong without any process group, all of it, before there is one.

    Args:
        config: the recipe's configuration.
        prepare: the recipe's own.

    Returns:
        What ``prepare`` found, and what the checks did.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    ready = prepare(config, problems)
    start = check_start(config, ready, os.environ, problems)
    problems.refuse()
    return ready, start


def check_start(config: Any, ready: Any, environ: Mapping[str, str], problems: Problems) -> Start:
    """Run all checks of the table; what is wrong goes on the list.

    Args:
        config: a recipe's configuration, with `MISSING` for a section that could not be read.
        ready: what the recipe's ``prepare`` returned.
        environ: what the launcher left, or would leave.
        problems: the list.
    """
    sections = {section.name: getattr(config, section.name) for section in fields(config)}
    known: dict[str, Any] = {
        "environ": environ,
        "train": sections["train"],
        "track": sections["track"],
        "model": sections["model"],
        "noise": sections["noise"],
        "config_yaml": MISSING
        if any(section is MISSING for section in sections.values())
        else to_yaml(config),
        "model_config": ready.model_config,
        "rows": ready.rows,
        "cuts_rows": ready.cuts_rows,
        "rule": ready.rule,
    }
    for name, check in CHECKS.items():
        wanted = inspect.signature(check).parameters.items()
        arguments = {
            key: known[key]
            for key, parameter in wanted
            # What has a default can be done without.
            if known[key] is not MISSING or parameter.default is parameter.empty
        }
        known[name] = problems.of(check, **arguments)
    return Start(**{field.name: known[field.name] for field in fields(Start)})


def check_locks(environ: Mapping[str, str], deepspeed: FilledConfig | None) -> None:
    """Refuse locks that DeepSpeed would wait for."""
    if deepspeed is not None:
        refuse_left_locks(offloads_optimizer=offloads_optimizer(deepspeed.config))


def check_loading(
    model: AdapterConfig, noise: NoiseConfig, environ: Mapping[str, str], deepspeed: FilledConfig | None
) -> None:
    """Refuse to load a model in parts where something is done to it that needs the whole."""
    settings = {"model.use_peft=true": model.use_peft, "noise.kind=r4f": noise.kind == "r4f"}
    asked = [setting for setting, is_on in settings.items() if is_on]
    if asked and deepspeed is not None and partitions_at_load(environ, deepspeed.config):
        raise ConfigError(
            f"{' and '.join(asked)}: needs whole weights, and with zero3_init_flag: true ZeRO-3 cuts the model "
            "while it loads; set zero3_init_flag: false in the accelerate configuration"
        )


def check_tracker(track: TrackConfig) -> None:
    """Refuse a tracker that is not installed."""
    available = ("none", "all", *map(str, get_available_trackers()))
    if track.report_to not in available:
        raise ConfigError(
            f"track.report_to is {track.report_to}, which is not installed; install it, or set track.report_to=none"
        )


def check_folder(train: TrainConfig, config_yaml: str) -> None:
    """Refuse a folder that holds something else than this run."""
    refuse_used(train.output_dir, resume=train.resume_from_checkpoint, config_yaml=config_yaml)


def check_checkpoint(
    train: TrainConfig,
    environ: Mapping[str, str],
    deepspeed: FilledConfig | None,
    rule: Rule | None,
    cuts_rows: bool,
    total_steps: int | None = None,
) -> None:
    """Refuse a checkpoint that this run cannot go on from, as far as its manifest and the settings tell."""
    found = checkpoint_on_paper(train.resume_from_checkpoint, Path(train.output_dir))
    if found is None:
        return
    path, manifest = found
    before, ranks = RunRecord.read(manifest.content, path), int(environ.get("WORLD_SIZE", "1"))
    batch = train.per_device_train_batch_size * ranks
    now = replace(
        before.setup,  # what is not known yet is taken to be the same
        stage=None if deepspeed is None else deepspeed.config["zero_optimization"].get("stage", 0),
        world_size=ranks,
        per_device_train_batch_size=train.per_device_train_batch_size,
        rows_per_step=batch * train.gradient_accumulation_steps,
        grouped_by=batch if train.group_by_length else None,
        seed=train.seed,
    )
    if total_steps is not None and not _may_be_longer(train, cuts_rows):
        now = replace(now, total_steps=total_steps)
    require_same_run(before, now, path)
    require_same_engine(before, now, path, average=path / AVERAGE)
    require_averages(before, path, there=AVERAGE in manifest.sealed, wanted=rule is not None)
    batches_read(before, now)


def count_steps(
    train: TrainConfig, environ: Mapping[str, str], rows: Mapping[str, Sized] | None = None
) -> int:
    """Return the steps of the run, told from its rows where the settings do not say; missing where neither does."""
    if train.max_steps > 0:
        return train.max_steps
    if rows is None:
        return MISSING
    return planned_steps(train, num_rows=len(rows["train"]), world_size=int(environ.get("WORLD_SIZE", "1")))


def check_schedule(
    train: TrainConfig, total_steps: int, cuts_rows: bool, rule: Rule | None = MISSING
) -> Schedule:
    """Return the schedule; missing where it does not fit the fewest steps that there can be."""
    return _unless_longer(
        train, cuts_rows, lambda: build_schedule(train, total_steps=total_steps, averaging=rule is not None)
    )


def check_plan(train: TrainConfig, total_steps: int, rule: Rule | None, cuts_rows: bool) -> Plan | None:
    """Return what is averaged when; missing where it does not fit the fewest steps that there can be."""
    return _unless_longer(train, cuts_rows, lambda: plan_rule(rule, total_steps))


def _unless_longer(train: TrainConfig, cuts_rows: bool, check: Callable[[], Any]) -> Any:
    """Return what a check of the run's length does; missing where it refuses and the run may be longer."""
    try:
        return check()
    except ConfigError:
        if _may_be_longer(train, cuts_rows):
            return MISSING
        raise


def _may_be_longer(train: TrainConfig, cuts_rows: bool) -> bool:
    """Whether long rows are cut into more than were counted."""
    return cuts_rows and train.max_steps <= 0


CHECKS: dict[str, Callable[..., Any]] = {
    "compilation": refuse_compilation,
    "parallelism": refuse_parallelism,
    "routing": refuse_routing,
    "layers": keep_all_layers,
    "obeyed": obey_fsdp2,
    "precision": resolve_precision,
    "hidden_size": hidden_size,
    "deepspeed": resolve_deepspeed,
    "fsdp2": resolve_fsdp2,
    "engine": EngineSettings,
    "locks": check_locks,
    "loading": check_loading,
    "tracker": check_tracker,
    "folder": check_folder,
    "total_steps": count_steps,
    "checkpoint": check_checkpoint,
    "schedule": check_schedule,
    "plan": check_plan,
}
"""Every check by the name of what it finds. Its arguments are taken by their names from what is known by then."""
