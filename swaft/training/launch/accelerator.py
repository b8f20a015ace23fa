"""Starts accelerate so that the engine the launcher asked for is the engine that runs.

On a machine without CUDA accelerate drops DeepSpeed if ``cpu=True`` is given, and takes every rank to be
alone if no backend is given; a plain launch without ``cpu=True`` leaves the ranks unwrapped. All three
train, but silently do so wrongly, so the outcome is checked here.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch.distributed import distributed_c10d

from swaft.errors import ConfigError, TrainingError
from swaft.training.config import RecipeConfig, TrainConfig
from swaft.training.launch.deepspeed_config import (
    FilledConfig,
    declared_precision,
    fill_auto,
    launcher_config,
    launcher_problems,
    recipe_values,
    stage_of,
    uses_deepspeed,
)
from swaft.training.launch.deepspeed_extension import use_environment
from swaft.training.launch.deepspeed_rules import deepspeed_problems
from swaft.training.launch.fsdp2 import obey_fsdp2, resolve_fsdp2, start_on_cpu, uses_fsdp

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What accelerate is started with, from launcher, DeepSpeed file and recipe together."""

    precision: str
    """``no``, ``bf16`` or ``fp16``."""
    deepspeed: FilledConfig | None
    fsdp2: FullyShardedDataParallelPlugin | None


def resolve_engine(
    train: TrainConfig, environ: Mapping[str, str], *, hidden_size: int | None
) -> EngineSettings:
    """Return what accelerate is started with, if launcher, DeepSpeed file and recipe do not contradict each other.

    Args:
        train: section ``train``; it is updated with the FSDP2 options that the recipe implements itself.
        environ: environment variables set by the launcher.
        hidden_size: width of the model, for DeepSpeed's bucket sizes; None leaves them to accelerate.

    Raises:
        ConfigError: with every contradiction.
    """
    obey_fsdp2(environ, train)
    precision = resolve_precision(train, environ)
    deepspeed = resolve_deepspeed(train, environ, precision=precision, hidden_size=hidden_size)
    fsdp2 = resolve_fsdp2(environ, precision=precision)
    return EngineSettings(precision=precision, deepspeed=deepspeed, fsdp2=fsdp2)


def build_accelerator(config: RecipeConfig, engine: EngineSettings) -> Accelerator:
    """Start the process group and the engine, seeded (collective).

    Raises:
        ConfigError: fp16 on a machine that cannot compute in it.
        TrainingError: accelerate started something other than the launcher asked for.
    """
    train, track, deepspeed, fsdp2 = config.train, config.track, engine.deepspeed, engine.fsdp2
    refuse_fp16_on_cpu(engine.precision)
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        # accelerate refuses a launcher file that sets a precision next to a DeepSpeed file. By now that precision,
        # and every other value this guard covers, has been compared with the DeepSpeed file.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated, with a warning at every call.
        renamed = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", category=FutureWarning, message=renamed)
        if on_cpu:
            use_environment()
    if fsdp2:  # otherwise transformers leaves ranks with empty weights
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision=engine.precision,
        # accelerate reads cpu=True as "no DeepSpeed"; without DeepSpeed a CPU rank needs cpu=True for DDP.
        cpu=on_cpu and deepspeed is None,
        # Unless this is off, accelerate would partition the model while it loads.
        deepspeed_plugin=deepspeed
        and DeepSpeedPlugin(
            hf_ds_config=deepspeed.config, zero3_init_flag=partitions_at_load(os.environ, deepspeed.config)
        ),
        fsdp_plugin=fsdp2,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.gradient_accumulation_steps),
        kwargs_handlers=[process_group(train, on_cpu=on_cpu)] if "LOCAL_RANK" in os.environ else None,
        log_with=None if track.report_to == "none" else track.report_to,
        project_config=ProjectConfiguration(
            project_dir=train.output_dir,
            logging_dir=track.logging_dir or str(Path(train.output_dir) / "logs"),
        ),
    )
    if fsdp2 and on_cpu:
        start_on_cpu(accelerator, fsdp2)
    check_engine(accelerator, os.environ)
    if deepspeed:
        for key, value, origin in deepspeed.rows:
            logger.info("ds  %-58s %-12s (%s)", key, value, origin)
    set_seed(train.seed)
    return accelerator


def resolve_precision(train: TrainConfig, environ: Mapping[str, str]) -> str:
    """Return the number format to train in: ``no``, ``bf16`` or ``fp16``.

    ``auto`` takes the launcher's; a DeepSpeed file that switches a format on itself counts as the launcher's
    choice if the accelerate configuration does not set one.

    Raises:
        ConfigError: two places contradict each other.
    """
    launcher, wanted = environ.get("ACCELERATE_MIXED_PRECISION", "no"), train.mixed_precision
    stated = "mixed_precision" in environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    if uses_deepspeed(environ) and launcher == "no" and not stated:
        launcher = declared_precision(launcher_config(environ)[0]) or launcher
    if launcher not in ("no", "bf16", "fp16"):
        raise ConfigError(
            f"the launcher asks for mixed_precision {launcher}; swaft trains in no, bf16 or fp16"
        )
    if wanted not in ("auto", launcher) and "ACCELERATE_MIXED_PRECISION" in environ:
        raise ConfigError(
            f"train.mixed_precision is {wanted}, but the launcher's mixed_precision is {launcher}; "
            f"make them equal, or set train.mixed_precision=auto to take the launcher's"
        )
    return launcher if wanted == "auto" else wanted


def refuse_fp16_on_cpu(precision: str) -> None:
    """Refuse a precision this machine cannot train in: `resolve_precision` is used on other machines too."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("fp16 needs a CUDA device, but there is none; use mixed precision bf16 or no")


def resolve_deepspeed(
    train: TrainConfig, environ: Mapping[str, str], *, precision: str, hidden_size: int | None = None
) -> FilledConfig | None:
    """Return the filled DeepSpeed configuration, or None if the launcher did not ask for DeepSpeed.

    ``hidden_size`` is the width of the model, for DeepSpeed's bucket sizes; None leaves them to accelerate.

    Raises:
        ConfigError: with every contradiction between launcher, DeepSpeed file and recipe.
    """
    if not uses_deepspeed(environ):
        return None
    if environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise ConfigError(
            "ACCELERATE_USE_CPU is true, which makes accelerate silently drop DeepSpeed; "
            "set use_cpu: false in the accelerate configuration (without a GPU the CPU is used anyway)"
        )
    config, source = launcher_config(environ)
    world_size = int(environ.get("WORLD_SIZE", "1"))
    wanted = recipe_values(train, precision=precision, world_size=world_size, hidden_size=hidden_size)
    filled = fill_auto(config, wanted, source=source)
    refused, ignored = deepspeed_problems(filled.config, source=source)
    dropped = launcher_problems(environ, train, filled.config)
    if problems := [*filled.problems, *dropped, *refused]:
        raise ConfigError(problems)
    notes = [(name, "ignored", "DeepSpeed has no setting of that name") for name in ignored]
    return replace(filled, rows=[*filled.rows, *notes])


def check_engine(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """Raise unless the engine and the number of ranks are what the launcher announced."""
    world_size, seen = int(environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    started = accelerator.distributed_type
    asked = "DeepSpeed" if uses_deepspeed(environ) else "FSDP2" if uses_fsdp(environ) else None
    if asked != {DistributedType.DEEPSPEED: "DeepSpeed", DistributedType.FSDP: "FSDP2"}.get(started):
        raise TrainingError(
            f"accelerate started {started.value}, but the launcher asked for {asked or 'one process or DDP'}; "
            "check ACCELERATE_USE_CPU, and start the ranks with accelerate launch or torchrun"
        )
    if seen != world_size:
        raise TrainingError(
            f"{world_size} ranks were launched (WORLD_SIZE), but accelerate sees {seen}, so each would train "
            "alone; start the ranks with accelerate launch or torchrun"
        )
    if world_size > 1 and started == DistributedType.NO:
        raise TrainingError(
            f"accelerate started {world_size} ranks that would not exchange gradients; use "
            "launch/accelerate/ddp_cpu.yaml"
        )


def process_group(train: TrainConfig, *, on_cpu: bool) -> InitProcessGroupKwargs:
    """Return how to start the ranks' process group: over gloo on CPUs, with ``ddp_timeout`` as its timeout.

    Makes that timeout torch's default for every group of this process. Groups made by others, such as DeepSpeed,
    take that default and not the first group's timeout; and accelerate drops a timeout that equals its own default.
    """
    timeout = timedelta(seconds=train.ddp_timeout)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    return InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=timeout)


@contextmanager
def whole_model_loading(accelerator: Accelerator) -> Iterator[None]:
    """Context in which a model loads whole on every rank, even under ZeRO-3.

    transformers partitions a model while it loads whenever a ZeRO-3 configuration is known, and accelerate
    makes it known whatever ``zero3_init_flag`` says. The weights of a partitioned model look empty: a spectral norm
    cannot be put on its head, and the shapes say nothing. A launcher that sets
    ``zero3_init_flag: true`` gets its partitioning, for models that would not fit otherwise.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero3_init_flag:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def engine_name(accelerator: Accelerator) -> str:
    """Return the engine in words for the banner, such as ``DeepSpeed ZeRO-3``."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"DeepSpeed ZeRO-{plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def partitions_at_load(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether every rank loads only its shard of the model, under a filled DeepSpeed configuration."""
    wanted = environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true"
    return wanted and stage_of(config) == 3
