"""What every run is checked for before it starts: one table, which the run, `swaft validate` and `swaft plan` read.

What a recipe checks of its own task stands in its ``prepare``, which all three call as well. So a rule belongs into
one of these two places, and is known to all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import get_available_trackers

from swaft.averaging.rules import Plan
from swaft.errors import ConfigError
from swaft.training.checks.problems import MissingPart, Parts, Problems
from swaft.training.checks.recipe import Prepared
from swaft.training.checks.refusals import (
    keep_all_layers,
    refuse_compilation,
    refuse_parallelism,
    refuse_routing,
)
from swaft.training.config import TrainConfig, plan_rule, to_yaml
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

Ready = TypeVar("Ready", bound=Prepared)


class Start(Parts):
    """What the checks read, and what they found out; a part is missing where a problem stands in its way."""

    config: Any
    """The recipe's configuration; a section that could not be read is missing."""
    ready: Prepared
    """What the recipe's ``prepare`` found."""
    environ: Mapping[str, str]
    """What the launcher left, or would leave."""
    precision: str
    """``no``, ``bf16`` or ``fp16``."""
    hidden_size: int
    """Width of the model."""
    deepspeed: FilledConfig | None
    """Its filled file; None: another engine."""
    fsdp2: Any
    """accelerate's plugin; None: another engine."""
    engine: EngineSettings
    """What accelerate is started with."""
    total_steps: int
    """Optimizer steps of the run, told from its rows."""
    schedule: Schedule
    """Learning rate by step."""
    plan: Plan | None
    """What is averaged when; None: nothing is averaged."""

    @property
    def train(self) -> TrainConfig:
        """Section ``train``."""
        return self.config.train

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return int(self.environ.get("WORLD_SIZE", "1"))

    @property
    def may_be_longer(self) -> bool:
        """Whether long rows are cut into more than were counted."""
        return self.ready.cuts_rows and self.train.max_steps <= 0


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


def check_start(config: Any, ready: Prepared, environ: Mapping[str, str] | None, problems: Problems) -> Start:
    """Run all checks of the table; what is wrong goes on the list.

    Args:
        config: a recipe's configuration; a section that could not be read is missing.
        ready: what the recipe's ``prepare`` returned.
        environ: what the launcher left, or would leave; None: not known, so what needs it is left out.
        problems: the list.
    """
    start = Start()
    start.config, start.ready = config, ready
    if environ is not None:
        start.environ = environ
    for name, check in CHECKS.items():
        with problems:
            setattr(start, name, check(start))
    return start


def check_locks(start: Start) -> None:
    """Refuse locks that DeepSpeed would wait for."""
    if start.deepspeed is not None:
        refuse_left_locks(offloads_optimizer=offloads_optimizer(start.deepspeed.config))


def check_loading(start: Start) -> None:
    """Refuse to load a model in parts where something is done to it that needs the whole."""
    model, noise, deepspeed = start.config.model, start.config.noise, start.deepspeed
    settings = {"model.use_peft=true": model.use_peft, "noise.kind=r4f": noise.kind == "r4f"}
    asked = [setting for setting, is_on in settings.items() if is_on]
    if asked and deepspeed is not None and partitions_at_load(start.environ, deepspeed.config):
        raise ConfigError(
            f"{' and '.join(asked)}: needs whole weights, and with zero3_init_flag: true ZeRO-3 cuts the model "
            "while it loads; set zero3_init_flag: false in the accelerate configuration"
        )


def check_tracker(start: Start) -> None:
    """Refuse a tracker that is not installed."""
    asked = start.config.track.report_to
    if asked not in ("none", "all", *map(str, get_available_trackers())):
        raise ConfigError(
            f"track.report_to is {asked}, which is not installed; install it, or set track.report_to=none"
        )


def check_folder(start: Start) -> None:
    """Refuse a folder that holds something else than this run."""
    folder, resume = start.train.output_dir, start.train.resume_from_checkpoint
    refuse_used(folder, resume=resume, config_yaml=to_yaml(start.config))


def check_checkpoint(start: Start) -> None:
    """Refuse a checkpoint that this run cannot resume from, as far as its manifest and the settings tell."""
    train, deepspeed, rule = start.train, start.deepspeed, start.ready.rule
    found = checkpoint_on_paper(train.resume_from_checkpoint, Path(train.output_dir))
    if found is None:
        return
    path, manifest = found
    before = RunRecord.read(manifest.content, path)
    batch = train.per_device_train_batch_size * start.world_size
    now = replace(
        before.setup,  # what is not known yet is taken to be the same
        stage=None if deepspeed is None else deepspeed.config["zero_optimization"].get("stage", 0),
        world_size=start.world_size,
        per_device_train_batch_size=train.per_device_train_batch_size,
        rows_per_step=batch * train.gradient_accumulation_steps,
        grouped_by=batch if train.group_by_length else None,
        seed=train.seed,
    )
    if hasattr(start, "total_steps") and not start.may_be_longer:
        now = replace(now, total_steps=start.total_steps)
    require_same_run(before, now, path)
    require_same_engine(before, now, path, average=path / AVERAGE)
    require_averages(before, path, there=AVERAGE in manifest.sealed, wanted=rule is not None)
    batches_read(before, now)


def count_steps(start: Start) -> int:
    """Return the steps of the run, told from its rows where the settings do not say; missing where neither does."""
    if start.train.max_steps > 0:
        return start.train.max_steps
    return planned_steps(start.train, num_rows=len(start.ready.rows["train"]), world_size=start.world_size)


def check_schedule(start: Start) -> Schedule:
    """Return the schedule; missing where it does not fit the fewest steps that there can be."""
    averages = getattr(start.ready, "rule", "not known") is not None
    return _unless_longer(
        start, lambda: build_schedule(start.train, total_steps=start.total_steps, averaging=averages)
    )


def check_plan(start: Start) -> Plan | None:
    """Return what is averaged when; missing where it does not fit the fewest steps that there can be."""
    return _unless_longer(start, lambda: plan_rule(start.ready.rule, start.total_steps))


def _unless_longer(start: Start, check: Callable[[], Any]) -> Any:
    """Return what a check of the run's length does; missing where it refuses and the run may be longer."""
    try:
        return check()
    except ConfigError as error:
        if start.may_be_longer:
            raise MissingPart(str(error)) from error
        raise


CHECKS: dict[str, Callable[[Start], Any]] = {
    "compilation": lambda start: refuse_compilation(start.environ),
    "parallelism": lambda start: refuse_parallelism(start.environ),
    "routing": lambda start: refuse_routing(start.environ, start.ready.model_config),
    "layers": lambda start: keep_all_layers(start.environ, start.ready.model_config),
    "obeyed": lambda start: obey_fsdp2(start.environ, start.train),
    "precision": lambda start: resolve_precision(start.train, start.environ),
    "hidden_size": lambda start: hidden_size(start.ready.model_config),
    "deepspeed": lambda start: resolve_deepspeed(
        start.train,
        start.environ,
        precision=start.precision,
        hidden_size=getattr(start, "hidden_size", None),
    ),
    "fsdp2": lambda start: resolve_fsdp2(start.environ, precision=start.precision),
    "engine": lambda start: EngineSettings(
        precision=start.precision, deepspeed=start.deepspeed, fsdp2=start.fsdp2
    ),
    "locks": check_locks,
    "loading": check_loading,
    "tracker": check_tracker,
    "folder": check_folder,
    "total_steps": count_steps,
    "checkpoint": check_checkpoint,
    "schedule": check_schedule,
    "plan": check_plan,
}
"""Every check by the name of what it finds."""
