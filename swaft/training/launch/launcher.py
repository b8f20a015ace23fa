"""Reads an ``accelerate launch`` line as accelerate would, without starting anything.

The options are parsed, filled from the launch file and turned into the ranks' environment by accelerate's own
functions, so what is read here is what a launch would do. What those functions would take from this machine
(how many GPUs it has, say) has to be said on the line, so that a launch on a cluster can be read on a laptop.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from swaft.errors import ConfigError
from swaft.options import suggestion
from swaft.training.config.values import not_allowed
from swaft.training.launch.deepspeed_config import launcher_config

ENGINES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP")
"""What a launch file may name as ``distributed_type``."""
PRECISIONS = ("no", "bf16", "fp16", "fp8")
COUNTS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
STAGES = (0, 1, 2, 3)
SECTION_PREFIXES = {"deepspeed_config": "", "fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}
"""Sections of a launch file whose entries are options of the command line, and what their names begin with."""
OLD_NAMES = ("fp16", "dynamo_backend")
"""Entries of older launch files that accelerate still takes."""
PARADIGMS = ("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What an ``accelerate launch`` line starts."""

    engine: str
    """``one process``, ``DDP``, ``DeepSpeed ZeRO-0`` to ``DeepSpeed ZeRO-3``, or ``FSDP2`` (``FSDP1``, which the
    recipes refuse)."""
    stage: int | None
    """DeepSpeed's stage of ZeRO, 0 to 3; None under another engine."""
    num_machines: int
    """Machines that train together."""
    world_size: int
    """Ranks that train together, on all machines."""
    environ: dict[str, str]
    """Environment of the ranks, as far as it is the same for all: this process's, and what the launcher adds."""
    script: str
    """What is started on every rank: a path, or a module's name."""
    arguments: list[str]
    """Its arguments."""


def read_launch(words: Sequence[str]) -> Launch:
    """Return what ``accelerate launch`` would start with these words.

    Nothing is started, and no device is looked at.

    Args:
        words: the command line after ``accelerate launch``.

    Raises:
        ConfigError: with every problem of the options and of the launch file, or, where those are right, of what
            they come to.
    """
    args = _parse(words)
    problems = [*_option_problems(args), *_file_problems(args)]
    if problems:
        raise ConfigError([*_script_problems(args), *problems])
    start = _start(args)
    stage, problems = _deepspeed_stage(start.environ)
    problems = [*_script_problems(args), *_start_problems(args, start), *problems]
    if problems:
        raise ConfigError(problems)
    return Launch(
        engine=_engine(start, stage),
        stage=stage,
        num_machines=start.num_machines,
        world_size=start.world_size,
        environ=start.environ | {"WORLD_SIZE": str(start.world_size)},
        script=args.training_script,
        arguments=list(args.training_script_args),
    )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What accelerate makes of the options and the file."""

    launcher: str
    """``simple``, ``torchrun`` or ``deepspeed``: which of accelerate's launchers starts the ranks."""
    num_machines: int
    asked: int
    """Processes that the line or the file asks for."""
    world_size: int
    """Processes that are started."""
    environ: dict[str, str]


def _parse(words: Sequence[str]) -> Namespace:
    from accelerate.commands.launch import launch_command_parser  # only here: takes seconds

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"the launch line: {message}; `accelerate launch --help` lists the options")

    parser = launch_command_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(words))


@dataclass(frozen=True)
class Script:
    """What a launch line starts on every rank."""

    path: str
    """A path, or a module's name."""
    arguments: list[str]
    """Its own arguments."""
    is_file: bool
    """Whether it is a script that Python runs, and there."""


def read_script(words: Sequence[str]) -> Script:
    """Return what a launch line starts, whether or not the line is right otherwise.

    Args:
        words: the command line after ``accelerate launch``.

    Raises:
        ConfigError: where the launcher's options cannot be told from the script.
    """
    args = _parse(words)
    is_file = not (args.module or args.no_python) and Path(args.training_script).is_file()
    return Script(args.training_script, list(args.training_script_args), is_file)


def _script_problems(args: Namespace) -> list[str]:
    if args.module or args.no_python or Path(args.training_script).is_file():
        return []
    return [f"{args.training_script}: there is no such file; expected a script after the launcher's options"]


def _option_problems(args: Namespace) -> list[str]:
    """What is wrong with the line itself, or would be left to the devices of this machine."""
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
                "the launch line: without a launch file accelerate starts a process for every GPU it finds; say "
                "how many with --num_processes, or name a file with --config_file"
            )
        elif args.num_processes > 1 and not chosen:
            problems.append(
                f"the launch line: without a launch file it depends on the machine whether {args.num_processes} "
                "processes train together; add --multi_gpu, or name a file with --config_file"
            )
    return problems


def _file_problems(args: Namespace) -> list[str]:
    """What is wrong with the launch file; accelerate would report the first, or pass over it."""
    if args.config_file is None:
        return []
    path = args.config_file
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return [f"--config_file {path}: cannot be read ({error.strerror}); give the path of a launch file"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [f"--config_file {path}: is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return [f"--config_file {path}: expected entries such as `distributed_type: MULTI_GPU`"]
    problems = [*_unknown_entries(content, args), *_bad_values(content)]
    return [f"{path}: {problem}" for problem in problems]


def _unknown_entries(content: Mapping[Any, Any], args: Namespace) -> list[str]:
    from accelerate.commands.config.config_args import ClusterConfig

    known = (*(field.name for field in fields(ClusterConfig)), *OLD_NAMES)
    problems = [
        f"there is no entry {name}.{suggestion(str(name), known)}" for name in content if name not in known
    ]
    options = tuple(vars(args))
    for section, prefix in SECTION_PREFIXES.items():
        entries = content.get(section) or {}
        if not isinstance(entries, dict):
            problems.append(f"{section}: expected entries below it, found {entries!r}")
            continue
        own = tuple(name for name in options if name.startswith(prefix))
        problems += [
            f"{section}: there is no entry {name}.{suggestion(str(name), own)}"
            for name in entries
            if name not in own and f"{prefix}{name}" not in own
        ]
    return problems


def _bad_values(content: Mapping[Any, Any]) -> list[str]:
    problems = []
    if content.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        problems.append(f"compute_environment: {content['compute_environment']}; expected LOCAL_MACHINE")
    if "distributed_type" not in content:
        problems.append(f"distributed_type: is missing; expected one of {', '.join(ENGINES)}")
    for name, choices in (("distributed_type", ENGINES), ("mixed_precision", PRECISIONS)):
        value = content.get(name)
        if value is False:  # YAML reads an unquoted no so
            problems.append(f"{name}: an unquoted no is false in YAML; put it in quotes")
        elif value is not None and value not in choices:
            problems.append(f"{name}: {not_allowed(str(value), choices)}")
    dynamo = content.get("dynamo_config")
    backends = ("dynamo_backend", "dynamo_config_dynamo_backend")
    if isinstance(dynamo, dict) and any(dynamo.get(name) is False for name in backends):
        problems.append("dynamo_config: dynamo_backend: an unquoted no is false in YAML; put it in quotes")
    for name in COUNTS:
        value = content.get(name)
        if type(value) is not int and (value is not None or (name == "num_processes" and name in content)):
            problems.append(f"{name}: {value!r} is not a whole number")
    deepspeed = content.get("deepspeed_config")
    if isinstance(deepspeed, dict):
        wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
            "zero_stage": (lambda value: value in STAGES, "0, 1, 2 or 3"),
            "gradient_accumulation_steps": (_is_number_or_auto, "a number or auto"),
            "gradient_clipping": (_is_number_or_auto, "a number or auto"),
        }
        problems += [
            f"deepspeed_config: {name} is {deepspeed[name]!r}; expected {expected}"
            for name, (fits, expected) in wanted.items()
            if deepspeed.get(name) is not None and not fits(deepspeed[name])
        ]
    return problems


def _is_number_or_auto(value: Any) -> bool:
    return value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool))


def _start(args: Namespace) -> _Start:
    """Let accelerate fill the options from the file and make the environment of the ranks."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    try:
        args, defaults, precision_from_file = _validate_launch_command(args)
        asked, num_machines = int(args.num_processes), int(args.num_machines or 1)
        # Port 0 is any free one: whether the real one is free is a question about another machine.
        args.main_process_ip, args.main_process_port, args.machine_rank = "127.0.0.1", 0, 0
        if args.use_deepspeed and not args.cpu:
            stated = list(getattr(defaults, "deepspeed_config", None) or ())
            stated += ["mixed_precision"] * precision_from_file
            args.deepspeed_fields_from_accelerate_config = ",".join(stated)
            launcher, environ = "deepspeed", prepare_deepspeed_cmd_env(args)[1]
        elif (args.use_fsdp or args.multi_gpu) and not args.cpu:
            launcher, environ = "torchrun", prepare_multi_gpu_env(args)
        else:
            launcher, environ = "simple", prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"accelerate launch: {' '.join(str(error).split())}") from error
    started = 1 if launcher == "simple" else asked // num_machines * num_machines
    return _Start(
        launcher=launcher, num_machines=num_machines, asked=asked, world_size=started, environ=environ
    )


def _start_problems(args: Namespace, start: _Start) -> list[str]:
    """What accelerate would start without a word, though it is not what was asked for."""
    problems = []
    if start.asked < 1 or start.num_machines < 1:
        problems.append(
            f"num_processes is {start.asked} on {start.num_machines} machines; expected 1 at least of each"
        )
    elif start.launcher == "simple" and (start.asked > 1 or start.num_machines > 1):
        reason = "--cpu" if args.cpu else "distributed_type NO (or MULTI_CPU)"
        problems.append(
            f"{start.asked} processes are asked for, but with {reason} accelerate starts 1 on each machine, which "
            "trains alone; use one of launch/accelerate/ (ddp_cpu.yaml without a GPU)"
        )
    elif start.launcher == "simple" and (args.use_deepspeed or args.use_fsdp):
        problems.append("--cpu makes accelerate drop DeepSpeed and FSDP without a word; leave it out")
    elif start.world_size != start.asked:
        problems.append(
            f"num_processes is {start.asked}, the number on all machines together, but {start.num_machines} "
            f"machines would start {start.world_size}; expected a multiple of {start.num_machines}"
        )
    over_ssh = args.deepspeed_multinode_launcher != "standard" and args.deepspeed_hostfile is None
    if start.launcher == "deepspeed" and start.num_machines > 1 and over_ssh:
        problems.append(
            f"deepspeed_multinode_launcher is {args.deepspeed_multinode_launcher}, which starts the other "
            "machines over ssh and needs deepspeed_hostfile; set it to standard, as "
            "launch/accelerate/zero3_multinode.yaml does"
        )
    return problems


def _deepspeed_stage(environ: Mapping[str, str]) -> tuple[int | None, list[str]]:
    """Return the stage that DeepSpeed runs at, None without DeepSpeed, and what is wrong with it."""
    if environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None, []
    try:
        config, source = launcher_config(environ)
    except ConfigError as error:
        return None, error.problems
    stage = config["zero_optimization"].get("stage", 0)
    if stage not in STAGES:
        return None, [f"{source}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3"]
    return stage, []


def _engine(start: _Start, stage: int | None) -> str:
    if stage is not None:
        return f"DeepSpeed ZeRO-{stage}"
    if start.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"FSDP{start.environ['FSDP_VERSION']}"
    return "DDP" if start.world_size > 1 else "one process"
