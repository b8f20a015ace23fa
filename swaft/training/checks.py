"""The checks of every run before it starts: one table, shared by the run, `swaft validate` and `swaft plan`.

Checks of a recipe's own task are in its ``prepare``, which all three call as well. So every check belongs in one of
these two places, and all three apply it. All problems are collected, where a plain chain of calls would stop at the
first.

A recipe is a script that defines ``Config``, the class of its settings, made of sections such as those of
`swaft.training.config`, and ``prepare(config, problems)``, which loads and checks everything that needs no device
and no other rank.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate.tracking import get_available_trackers
from transformers import PreTrainedConfig

from swaft.averaging.rules import Plan, Rule
from swaft.averaging.state import refuse_other_rule
from swaft.errors import ConfigError, SwaftError
from swaft.training.config import TrainConfig, plan_rule, to_yaml
from swaft.training.launch.accelerator import (
    EngineSettings,
    partitions_at_load,
    resolve_engine,
    resolve_precision,
)
from swaft.training.launch.deepspeed_config import offloads_optimizer, stage_of
from swaft.training.launch.deepspeed_extension import refuse_left_locks
from swaft.training.launch.failure import message_of
from swaft.training.models.build import Schedule, build_schedule, planned_steps
from swaft.training.models.pretrained import hidden_size
from swaft.training.run.checkpoints import AVERAGE, checkpoint_on_paper
from swaft.training.run.folder import refuse_used, resume_from
from swaft.training.run.record import (
    RunRecord,
    batches_read,
    layout_of,
    require_averages,
    require_same_run,
)

if TYPE_CHECKING:
    from swaft.training.evaluation.best import Target

logger = logging.getLogger(__name__)


class MissingPart(AttributeError):
    """A part that could not be made; the reason is on the list of problems."""


class Parts:
    """Attributes that are filled one by one; reading a missing one raises `MissingPart`."""

    def __getattr__(self, name: str) -> Any:
        raise MissingPart(name)


class Prepared(Parts):
    """What every recipe's `prepare` returns; a part is missing if its problem is on the list."""

    rows: Mapping[str, Any]
    """Rows by split, `train` among them."""
    columns: Any
    """The columns that are read; `str` gives them in words."""
    metric: Any
    """What scores predictions; None: there is only the loss."""
    model_config: Any
    """transformers configuration of the model."""
    tokenizer: Any
    """Tokenizer for the rows; None: a new one is to be trained."""
    objective: Any
    """Training objective, such as `swaft.R3F`."""
    rule: Rule | None
    """Averaging rule; None: nothing is averaged."""
    target: Target
    """What decides between weights."""
    cuts_rows: bool = False
    """Whether long rows are cut into several pieces, so that there may be more training inputs than rows."""


Ready = TypeVar("Ready", bound=Prepared)


class Problems:
    """The problems of one run, in the order in which they were found.

        problems, ready = Problems(), Parts()
        with problems:
            ready.rows = load_splits(config.data)
        with problems:
            ready.task = describe_task(ready.rows, config.data)   # left out where there are no rows
        problems.refuse()

    An error from `swaft.errors` ends its block and is put on the list; a missing part ends the block silently.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.skipped: list[str] = []
        """The missing parts that have ended a block."""

    def __enter__(self) -> None:
        """Start a block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the block, and put its problem on the list if it has one."""
        if isinstance(error, SwaftError):
            self.add(error.problems if isinstance(error, ConfigError) else [message_of(error)])
        if isinstance(error, MissingPart) and str(error) not in self.skipped:
            self.skipped.append(str(error))
        return isinstance(error, SwaftError | MissingPart)

    def add(self, problems: Iterable[str]) -> None:
        """Put problems on the list, each once."""
        self.found += [problem for problem in dict.fromkeys(problems) if problem not in self.found]

    def refuse(self) -> None:
        """Raise if there are problems.

        Raises:
            ConfigError: with all of them.
        """
        if self.found:
            raise ConfigError(self.found)


def read_recipe(path: Path) -> Any:
    """Import a recipe file (which starts nothing), and return its module, which has ``Config`` and ``prepare``.

    Returns None if the script is not a recipe, judged without running it. Other scripts may define the same two
    names; a recipe also imports from `swaft.training`.

    Raises:
        ConfigError: the file is not valid Python (with the line), or it cannot be imported.
    """
    try:
        body = ast.parse(path.read_bytes()).body
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno} is not Python: {error.msg}; fix that line") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; expected a Python file") from error
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    imported = [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    if not names >= {"Config", "prepare"} or not any(each.startswith("swaft.training.") for each in imported):
        return None
    name = f"swaft_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: cannot be imported; expected a Python file")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as when the script is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not (isinstance(module.Config, type) and is_dataclass(module.Config)):
        raise ConfigError(f"{path}: Config is not a dataclass of sections such as TrainConfig")
    return module


ROUTE_AMONG_MODULES = frozenset({"nllb-moe", "switch_transformers"})
"""Types of mixture-of-experts models that run the module of an expert only if a token is routed to it."""


class Start(Parts):
    """What the checks read and what they found; a part is missing if a problem prevented it."""

    config: Any
    """The recipe's configuration; a section that could not be read is missing."""
    ready: Prepared
    """What the recipe's ``prepare`` returned."""
    environ: Mapping[str, str]
    """Environment variables that the launcher set, or would set."""
    precision: str
    """``no``, ``bf16`` or ``fp16``."""
    engine: EngineSettings
    """Engine settings that accelerate is started with."""
    folder: Path
    """The run folder, which may be this run's."""
    total_steps: int
    """Optimizer steps of the run, counted from its rows."""
    schedule: Schedule
    """Learning rate by step."""
    plan: Plan | None
    """Which steps are averaged; None: nothing is averaged."""

    @property
    def train(self) -> TrainConfig:
        """Section ``train``."""
        return self.config.train

    @property
    def world_size(self) -> int:
        """Number of ranks in the run."""
        return int(self.environ.get("WORLD_SIZE", "1"))

    @property
    def may_be_longer(self) -> bool:
        """Whether the run may take more steps than counted, because long rows are cut into several."""
        return self.ready.cuts_rows and self.train.max_steps <= 0


def start_of(config: Any, prepare: Callable[[Any, Problems], Ready]) -> tuple[Ready, Start]:
    """Prepare and check everything that needs no process group, before there is one.

    Returns:
        What ``prepare`` returned, and what the checks found.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    ready = prepare(config, problems)
    start = check_start(config, ready, os.environ, problems)
    problems.refuse()
    return ready, start


def check_start(config: Any, ready: Prepared, environ: Mapping[str, str] | None, problems: Problems) -> Start:
    """Run all checks in the table; problems go on the list.

    Args:
        config: a recipe's configuration; a section that could not be read is missing.
        ready: what the recipe's ``prepare`` returned.
        environ: environment variables that the launcher set, or would set; None: not known, so checks that need
            them are skipped.
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
            "(and --dynamo_backend from the command line)"
        )


def refuse_parallelism(start: Start) -> None:
    """Refuse a launch that splits a batch, or a layer, over ranks."""
    if start.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() not in ("false", ""):
        raise ConfigError(
            "the launcher asks for parallelism_config, but in the recipes every rank trains on its own rows, "
            "with weights sharded over all ranks or none; remove it from the accelerate configuration"
        )


def refuse_routing(model_config: Any, world_size: int) -> None:
    """Refuse a mixture of experts whose experts are separate modules, if there are several ranks.

    Each rank would run different experts.
    """
    if world_size > 1 and model_config.model_type in ROUTE_AMONG_MODULES:
        raise ConfigError(
            f"the launcher starts {world_size} ranks, and the experts of a {model_config.model_type} "
            "are modules, of which each rank runs those its tokens are routed to, so the ranks would wait for each "
            "other; set num_processes: 1, or use a model that keeps its experts in one tensor (Mixtral, Qwen, ...)"
        )


def keep_all_layers(model_config: Any, world_size: int) -> None:
    """Turn off LayerDrop on several ranks, and log it.

    Ranks would drop different layers, and wait for their gradients. The rates in the configuration become 0
    (M2M100 has 0.05).
    """
    if world_size == 1:
        return
    parts = [each for each in vars(model_config).values() if isinstance(each, PreTrainedConfig)]
    for part in (model_config, *parts):
        for name, rate in [*vars(part).items()]:
            if name.endswith("layerdrop") and rate:
                logger.info("%s=%g is set to 0: ranks would drop different layers", name, rate)
                setattr(part, name, 0.0)


def read_engine(start: Start) -> EngineSettings:
    """Return what accelerate is started with; the model's width, if known, sizes DeepSpeed's buckets."""
    model_config = getattr(start.ready, "model_config", None)
    width = None if model_config is None else hidden_size(model_config)
    return resolve_engine(start.train, start.environ, hidden_size=width)


def check_locks(start: Start) -> None:
    """Refuse locks that DeepSpeed would wait for."""
    if (deepspeed := start.engine.deepspeed) is not None:
        refuse_left_locks(offloads_optimizer=offloads_optimizer(deepspeed.config))


def check_loading(start: Start) -> None:
    """Refuse to load a model in shards if a setting needs whole weights."""
    model, noise, deepspeed = start.config.model, start.config.noise, start.engine.deepspeed
    settings = {
        "model.use_peft=true": model.use_peft,
        "noise.kind=r4f": noise.kind == "r4f",
        "data.packing=true": getattr(start.config.data, "packing", False),  # tried out on the loaded model
    }
    asked = [setting for setting, is_on in settings.items() if is_on]
    if asked and deepspeed is not None and partitions_at_load(start.environ, deepspeed.config):
        raise ConfigError(
            f"{' and '.join(asked)}: needs whole weights, but with zero3_init_flag: true ZeRO-3 shards the model "
            "while it loads; set zero3_init_flag: false in the accelerate configuration"
        )


def check_tracker(start: Start) -> None:
    """Refuse a tracker that is not installed."""
    asked = start.config.track.report_to
    if asked not in ("none", "all", *map(str, get_available_trackers())):
        raise ConfigError(
            f"track.report_to is {asked}, which is not installed; install it, or set track.report_to=none"
        )


def check_folder(start: Start) -> Path:
    """Return the run folder; refuse one that holds anything other than this run."""
    folder, resume = Path(start.train.output_dir), start.train.resume_from_checkpoint
    refuse_used(folder, resume=resume, config_yaml=to_yaml(start.config))
    return folder


def check_checkpoint(start: Start) -> None:
    """Refuse a checkpoint that this run cannot resume from, judged by its manifest and the settings."""
    train, folder, deepspeed, rule = start.train, start.folder, start.engine.deepspeed, start.ready.rule
    resume = resume_from(folder, resume=train.resume_from_checkpoint, config_yaml=to_yaml(start.config))
    found = checkpoint_on_paper(resume, folder)
    if found is None:
        return
    path, manifest = found
    before = RunRecord.read(manifest.content, path)
    stage = None if deepspeed is None else stage_of(deepspeed.config)
    # What is not known yet is assumed to be the same.
    now = replace(before.setup, **layout_of(train, world_size=start.world_size, stage=stage))
    if hasattr(start, "total_steps") and not start.may_be_longer:
        now = replace(now, total_steps=start.total_steps)
    require_same_run(before, now, path)
    require_averages(before, path, there=AVERAGE in manifest.sealed, wanted=rule is not None)
    if rule is not None:
        refuse_other_rule(path / AVERAGE, rule, precision=start.config.averaging.precision)
    batches_read(before, now)


def count_steps(start: Start) -> int:
    """Return the steps of the run: `train.max_steps`, else counted from its rows; missing if both fail."""
    if start.train.max_steps > 0:
        return start.train.max_steps
    return planned_steps(start.train, num_rows=len(start.ready.rows["train"]), world_size=start.world_size)


def check_schedule(start: Start) -> Schedule:
    """Return the schedule; missing if it does not fit the counted steps but the run may be longer."""
    averages = getattr(start.ready, "rule", "not known") is not None
    return _unless_longer(
        start, lambda: build_schedule(start.train, total_steps=start.total_steps, averaging=averages)
    )


def check_plan(start: Start) -> Plan | None:
    """Return the averaging plan; missing if it does not fit the counted steps but the run may be longer."""
    return _unless_longer(start, lambda: plan_rule(start.ready.rule, start.total_steps))


def _unless_longer(start: Start, check: Callable[[], Any]) -> Any:
    """Return the result of a check of the run's length; missing if it fails but the run may be longer."""
    try:
        return check()
    except ConfigError as error:
        if start.may_be_longer:
            raise MissingPart("total_steps") from error
        raise


CHECKS: dict[str, Callable[[Start], Any]] = {
    "compilation": refuse_compilation,
    "parallelism": refuse_parallelism,
    "routing": lambda start: refuse_routing(start.ready.model_config, start.world_size),
    "layers": lambda start: keep_all_layers(start.ready.model_config, start.world_size),
    "precision": lambda start: resolve_precision(start.train, start.environ),
    "engine": read_engine,
    "locks": check_locks,
    "loading": check_loading,
    "tracker": check_tracker,
    "folder": check_folder,
    "total_steps": count_steps,
    "checkpoint": check_checkpoint,
    "schedule": check_schedule,
    "plan": check_plan,
}
"""Every check, by the name of its result."""
