"""What every run is checked for before it starts: one table, which the run, `swaft validate` and `swaft plan` read.

What a recipe checks of its own task stands in its ``prepare``, which all three call as well. So a rule belongs into
one of these two places, and is known to all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import get_available_trackers
from transformers import PreTrainedConfig

from swaft.averaging.rules import Plan
from swaft.errors import ConfigError
from swaft.training.checks.problems import MissingPart, Parts, Prepared, Problems
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
    layout_of,
    require_averages,
    require_same_run,
)
from swaft.training.run.schedule import Schedule, build_schedule, planned_steps

logger = logging.getLogger(__name__)

Ready = TypeVar("Ready", bound=Prepared)

ROUTE_AMONG_MODULES = frozenset({"nllb-moe", "switch_transformers"})
"""Types of mixtures of experts that run a module for each expert that some token chose, and no other."""


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
    deepspeed: FilledConfig | None
    """Its filled file; None: another engine."""
    fsdp2: Any
    """accelerate's plugin; None: another engine."""
    engine: EngineSettings
    """What accelerate is started with."""
    total_steps: int
    """Optimizer steps of the run, counted from its rows."""
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


def refuse_compilation(start: Start) -> None:
    """Refuse a launch that has accelerate compile the model."""
    backend = start.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if backend != "NO":
        raise ConfigError(
            f"the launcher asks for dynamo_backend {backend}, and the recipes do not compile: hooks and borrowed "
            "heads would break the graph at every step; remove dynamo_config from the accelerate configuration "
            "(and --dynamo_backend from the line)"
        )


def refuse_parallelism(start: Start) -> None:
    """Refuse a launch that splits a batch, or a layer, over ranks."""
    if start.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() not in ("false", ""):
        raise ConfigError(
            "the launcher asks for parallelism_config, and in the recipes every rank trains on rows of its own, "
            "with weights sharded over all ranks or none; remove it from the accelerate configuration"
        )


def refuse_routing(model_config: Any, world_size: int) -> None:
    """Refuse a mixture of experts that are modules of their own on several ranks: each would run others of them."""
    if world_size > 1 and model_config.model_type in ROUTE_AMONG_MODULES:
        raise ConfigError(
            f"the launcher starts {world_size} ranks, and the experts of a {model_config.model_type} "
            "are modules of which each rank runs those that its tokens choose, so the ranks would wait for each "
            "other; set num_processes: 1, or use a model that keeps its experts in one tensor (Mixtral, Qwen, ...)"
        )


def keep_all_layers(model_config: Any, world_size: int) -> None:
    """On several ranks leave out no layers, and log it: each would leave out others, and wait for their gradients.

    The rates of the configuration become 0 (M2M100 has 0.05).
    """
    for part in (model_config, *vars(model_config).values()) if world_size > 1 else ():
        rates = vars(part).items() if isinstance(part, PreTrainedConfig) else ()
        for name, rate in [(name, rate) for name, rate in rates if name.endswith("layerdrop") and rate]:
            logger.info("%s=%g is set to 0: ranks would leave out different layers", name, rate)
            setattr(part, name, 0.0)


def read_deepspeed(start: Start) -> FilledConfig | None:
    """Return DeepSpeed's file, filled; the model's width, where it is known, is for its bucket sizes."""
    model_config = getattr(start.ready, "model_config", None)
    width = None if model_config is None else hidden_size(model_config)
    return resolve_deepspeed(start.train, start.environ, precision=start.precision, hidden_size=width)


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
    stage = None if deepspeed is None else deepspeed.config["zero_optimization"].get("stage", 0)
    # What is not known yet is taken to be the same.
    now = replace(before.setup, **layout_of(train, world_size=start.world_size, stage=stage))
    if hasattr(start, "total_steps") and not start.may_be_longer:
        now = replace(now, total_steps=start.total_steps)
    require_same_run(before, now, path)
    require_averages(before, path, there=AVERAGE in manifest.sealed, wanted=rule is not None)
    batches_read(before, now)


def count_steps(start: Start) -> int:
    """Return the steps of the run, counted from its rows where the settings do not say; missing where both fail."""
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
    "compilation": refuse_compilation,
    "parallelism": refuse_parallelism,
    "routing": lambda start: refuse_routing(start.ready.model_config, start.world_size),
    "layers": lambda start: keep_all_layers(start.ready.model_config, start.world_size),
    "obeyed": lambda start: obey_fsdp2(start.environ, start.train),
    "precision": lambda start: resolve_precision(start.train, start.environ),
    "deepspeed": read_deepspeed,
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
