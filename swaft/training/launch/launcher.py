"""Reads an ``accelerate launch`` line as accelerate would, without starting anything.

The options are parsed, filled from the launch file and turned into the ranks' environment by accelerate's own
functions, so what is read here is what a launch would do. What those functions would take from this machine
(such as its number of GPUs) has to be given on the line, so that a launch on a cluster can be read on a laptop.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from swaft.errors import ConfigError, one_line
from swaft.options import suggestion
from swaft.training.config.values import not_allowed
from swaft.training.launch.deepspeed_config import STAGES, launcher_config, stage_of, uses_deepspeed
from swaft.training.launch.fsdp2 import uses_fsdp

ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP")
"""Allowed values of ``distributed_type`` in a launch file."""
PRECISIONS = ("no", "bf16", "fp16", "fp8")
COUNTS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
NUMBERS_OR_AUTO = ("gradient_accumulation_steps", "gradient_clipping")
SECTION_PREFIXES = {"deepspeed_config": "", "fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}
"""Sections of a launch file whose entries are command-line options, and the prefix of those options."""
OLD_NAMES = ("fp16", "dynamo_backend")
"""Entries of older launch files that accelerate still accepts."""
PARADIGMS = ("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What an ``accelerate launch`` line starts."""

    engine: str
    """``one process``, ``DDP``, ``DeepSpeed ZeRO-0`` to ``DeepSpeed ZeRO-3``, or ``FSDP2`` (``FSDP1``, which the
    recipes refuse)."""
    stage: int | None
    """DeepSpeed's ZeRO stage, 0 to 3; None under another engine."""
    num_machines: int
    """Machines that train together."""
    world_size: int
    """Ranks that train together, on all machines."""
    environ: dict[str, str]
    """The part of the ranks' environment that all share: this process's, and what the launcher adds."""


def read_launch(words: Sequence[str]) -> Launch:
    """Return what ``accelerate launch`` would start with these words, without starting or querying a device.

    Raises:
        ConfigError: with every problem of the options and of the launch file, or, if there is none, of what they
            lead to.
    """
    args = _parse(words)
    problems = [*_option_problems(args), *_file_problems(args)]
    if problems:
        raise ConfigError([*_script_problems(args), *problems])
    launcher, environ = _start(args)
    asked, machines = int(args.num_processes), int(args.num_machines or 1)
    world_size = 1 if launcher == "simple" else asked // machines * machines
    problems = [*_script_problems(args), *_start_problems(args, launcher, world_size)]
    stage = None
    engine = "DDP" if world_size > 1 else "one process"
    if uses_fsdp(environ):
        engine = f"FSDP{environ['FSDP_VERSION']}"
    if uses_deepspeed(environ):
        try:
            stage = stage_of(launcher_config(environ)[0])
            engine = f"DeepSpeed ZeRO-{stage}"
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Launch(
        engine=engine,
        stage=stage,
        num_machines=machines,
        world_size=world_size,
        environ=environ | {"WORLD_SIZE": str(world_size)},
    )


def _parse(words: Sequence[str]) -> Namespace:
    from accelerate.commands.launch import launch_command_parser  # imported here: takes seconds

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"the launch line: {message}; `accelerate launch --help` lists the options")

    parser = launch_command_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(words))


@dataclass(frozen=True)
class Script:
    """The script that a launch line starts on every rank."""

    path: str
    """A path, or a module's name."""
    arguments: list[str]
    """Its own arguments."""
    is_file: bool
    """Whether it is an existing script that Python runs."""


def read_script(words: Sequence[str]) -> Script:
    """Return the script that the words after ``accelerate launch`` start, even if the line has other problems.

    Raises:
        ConfigError: the launcher's options cannot be separated from the script.
    """
    args = _parse(words)
    is_file = not (args.module or args.no_python) and Path(args.training_script).is_file()
    return Script(args.training_script, list(args.training_script_args), is_file)


def _script_problems(args: Namespace) -> list[str]:
    if args.module or args.no_python or Path(args.training_script).is_file():
        return []
    return [f"{args.training_script}: there is no such file; expected a script after the launcher's options"]


def _option_problems(args: Namespace) -> list[str]:
    """Return what is wrong with the line itself, or would depend on this machine's devices."""
    from accelerate.commands.config.config_args import default_config_file

    problems = []
    chosen = [f"--{name}" for name in PARADIGMS if getattr(args, name)]
    if len(chosen) > 1:
        problems.append(f"the launch line: {' and '.join(chosen)} exclude each other; keep one")
    for name, supported in (
        ("tpu", "a GPU or CPU engine"),
        ("use_megatron_lm", "--use_deepspeed or --use_fsdp"),
    ):
        if getattr(args, name):
            problems.append(f"the launch line: swaft does not train with --{name}; use {supported}")
    if args.config_file is None and not Path(default_config_file).is_file():
        if args.num_processes is None:
            problems.append(
                "the launch line: without a launch file accelerate starts a process for every GPU it finds; set "
                "how many with --num_processes, or give a file with --config_file, before the recipe's name"
            )
        elif args.num_processes > 1 and not chosen:
            problems.append(
                f"the launch line: without a launch file it depends on the machine whether {args.num_processes} "
                "processes train together; add --multi_gpu, or give a file with --config_file"
            )
    return problems


def _file_problems(args: Namespace) -> list[str]:
    """Return what is wrong with the launch file; accelerate would report the first problem, or none."""
    if args.config_file is None:
        return []
    path = args.config_file
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return [f"--config_file {path}: cannot be read ({error.strerror}); give the path of a launch file"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"--config_file {path}: is not YAML: {one_line(error)}"]
    if not isinstance(content, dict):
        return [f"--config_file {path}: expected entries such as `distributed_type: MULTI_GPU`"]
    return [f"{path}: {problem}" for problem in (*_unknown_entries(content, args), *_bad_values(content))]


def _unknown_entries(content: Mapping[Any, Any], args: Namespace) -> Iterator[str]:
    from accelerate.commands.config.config_args import ClusterConfig

    known = (*(field.name for field in fields(ClusterConfig)), *OLD_NAMES)
    for name in content:
        if name not in known:
            yield f"there is no entry {name}.{suggestion(str(name), known)}"
    for section, prefix in SECTION_PREFIXES.items():
        entries = content.get(section) or {}
        if not isinstance(entries, dict):
            yield f"{section}: expected entries below it, found {entries!r}"
            continue
        own = tuple(name for name in vars(args) if name.startswith(prefix))
        for name in entries:
            if name not in own and f"{prefix}{name}" not in own:
                yield f"{section}: there is no entry {name}.{suggestion(str(name), own)}"


def _bad_values(content: Mapping[Any, Any]) -> Iterator[str]:
    if content.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        yield f"compute_environment: {content['compute_environment']}; expected LOCAL_MACHINE"
    if "distributed_type" not in content:
        yield f"distributed_type: is missing; expected one of {', '.join(ENGINES)}"
    for name, choices in (("distributed_type", ENGINES), ("mixed_precision", PRECISIONS)):
        value = content.get(name)
        if value is False:  # YAML's reading of an unquoted no
            yield f"{name}: an unquoted no is false in YAML; put it in quotes"
        elif value is not None and value not in choices:
            yield f"{name}: {not_allowed(str(value), choices)}"
    dynamo = content.get("dynamo_config")
    backends = ("dynamo_backend", "dynamo_config_dynamo_backend")
    if isinstance(dynamo, dict) and any(dynamo.get(name) is False for name in backends):
        yield "dynamo_config: dynamo_backend: an unquoted no is false in YAML; put it in quotes"
    for name in COUNTS:
        value = content.get(name)
        if type(value) is not int and (value is not None or (name == "num_processes" and name in content)):
            yield f"{name}: {value!r} is not a whole number"
    deepspeed = content.get("deepspeed_config")
    if isinstance(deepspeed, dict):
        for name, value in deepspeed.items():
            if name == "zero_stage" and value is not None and value not in STAGES:
                yield f"deepspeed_config: {name} is {value!r}; expected 0, 1, 2 or 3"
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in NUMBERS_OR_AUTO and value not in (None, "auto") and not is_number:
                yield f"deepspeed_config: {name} is {value!r}; expected a number or auto"


def _start(args: Namespace) -> tuple[str, dict[str, str]]:
    """Let accelerate fill the options from the file; return which of its launchers starts, and the environment.

    The launchers are ``simple``, ``torchrun`` and ``deepspeed``.
    """
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    try:
        args, defaults, precision_from_file = _validate_launch_command(args)
        # Port 0 is any free one: whether the real one is free depends on another machine.
        args.main_process_ip, args.main_process_port, args.machine_rank = "127.0.0.1", 0, 0
        if args.use_deepspeed and not args.cpu:
            stated = list(getattr(defaults, "deepspeed_config", None) or ())
            stated += ["mixed_precision"] * precision_from_file
            args.deepspeed_fields_from_accelerate_config = ",".join(stated)
            return "deepspeed", prepare_deepspeed_cmd_env(args)[1]
        if (args.use_fsdp or args.multi_gpu) and not args.cpu:
            return "torchrun", prepare_multi_gpu_env(args)
        return "simple", prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"accelerate launch: {one_line(error)}") from error


def _start_problems(args: Namespace, launcher: str, world_size: int) -> Iterator[str]:
    """Yield what accelerate would silently start although it is not what was asked for."""
    asked, machines = int(args.num_processes), int(args.num_machines or 1)
    if asked < 1 or machines < 1:
        yield f"num_processes is {asked} on {machines} machines; expected at least 1 of each"
    elif launcher == "simple" and (asked > 1 or machines > 1):
        reason = "--cpu" if args.cpu else "distributed_type NO (or MULTI_CPU)"
        yield (
            f"{asked} processes are asked for, but with {reason} accelerate starts 1 on each machine, which "
            "trains alone; use one of launch/accelerate/ (ddp_cpu.yaml without a GPU)"
        )
    elif launcher == "simple" and (args.use_deepspeed or args.use_fsdp):
        yield "--cpu makes accelerate silently drop DeepSpeed and FSDP; leave it out"
    elif world_size != asked:
        yield (
            f"num_processes is {asked}, the number on all machines together, but {machines} "
            f"machines would start {world_size}; expected a multiple of {machines}"
        )
    over_ssh = args.deepspeed_multinode_launcher != "standard" and args.deepspeed_hostfile is None
    if launcher == "deepspeed" and machines > 1 and over_ssh:
        yield (
            f"deepspeed_multinode_launcher is {args.deepspeed_multinode_launcher}, which starts the other "
            "machines over ssh and needs deepspeed_hostfile; set it to standard, as "
            "launch/accelerate/zero3_multinode.yaml does"
        )
