"""Fills a DeepSpeed configuration as transformers' Trainer would, and finds where it contradicts the recipe.

Users bring JSON files full of ``"auto"``. A plain accelerate loop fills few of them, fills
``gradient_clipping`` with 1.0 whatever the recipe says, and lets a number in the file win over the recipe
without a word. Here every value comes from the recipe, a number that differs is a problem, and every filled
value is listed with its source.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig

AUTO = "auto"
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""DeepSpeed's schedulers that are a warm-up and what follows; others are nothing that a recipe trains with."""
OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Names that DeepSpeed still takes and accelerate does not know."""
SHORT_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)
"""Names in ``zero_optimization`` that DeepSpeed takes with and without ``stage3_`` before them."""
SECTIONS = ("bf16", "fp16", "optimizer", "scheduler")
"""Entries of a file that are looked into."""


@dataclass(frozen=True, kw_only=True)
class RecipeValues:
    """What the recipe knows and a DeepSpeed file may ask for."""

    train: TrainConfig
    """Section ``train``."""
    precision: str
    """``no``, ``bf16`` or ``fp16``, resolved."""
    world_size: int
    """Ranks that train together."""
    hidden_size: int | None = None
    """Width of the model, for the bucket sizes of ZeRO; None leaves those keys to accelerate."""
    source: str = "the recipe's configuration"
    """Name of the file (or files) the recipe's values come from, for messages."""

    @property
    def optimizer(self) -> dict[str, tuple[Any, str]]:
        """What AdamW is built with, by its name in a file, and the setting it comes from."""
        train = self.train
        return {
            "lr": (train.learning_rate, "train.learning_rate"),
            "weight_decay": (train.weight_decay, "train.weight_decay"),
            "betas": ([train.adam_beta1, train.adam_beta2], "train.adam_beta1 and train.adam_beta2"),
            "eps": (train.adam_epsilon, "train.adam_epsilon"),
        }

    @property
    def always(self) -> dict[str, tuple[Any, str]]:
        """Every key that is there once a file is filled, its value, and the setting it comes from."""
        rows, accumulation = self.train.per_device_train_batch_size, self.train.gradient_accumulation_steps
        return {
            "train_micro_batch_size_per_gpu": (rows, "train.per_device_train_batch_size"),
            "gradient_accumulation_steps": (accumulation, "train.gradient_accumulation_steps"),
            "train_batch_size": (rows * accumulation * self.world_size, "batch x accumulation x ranks"),
            "gradient_clipping": (self.train.max_grad_norm, "train.max_grad_norm"),
            "bf16.enabled": (self.precision == "bf16", "mixed precision"),
            "fp16.enabled": (self.precision == "fp16", "mixed precision"),
        }


@dataclass(frozen=True)
class FilledConfig:
    """A DeepSpeed configuration without open questions."""

    config: dict[str, Any]
    """What DeepSpeed is given."""
    rows: list[tuple[str, Any, str]]
    """Key, value and source of every value that was filled in."""
    problems: list[str] = field(default_factory=list)
    """Contradictions between the file and the recipe, each a complete message."""


def launcher_config(environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the DeepSpeed configuration that ``accelerate launch`` announced, and a name for it.

    Args:
        environ: the process environment; the launcher sets ``ACCELERATE_DEEPSPEED_CONFIG_FILE`` where its
            file names a JSON file, and single values such as ``ACCELERATE_DEEPSPEED_ZERO_STAGE`` where it
            does not.

    Raises:
        ConfigError: where the file cannot be read.
    """
    named = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named != "none":
        return read_config(named), named if len(named) < 200 else "the DeepSpeed configuration"
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        path = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_NVME_PATH")
        if device != "none":
            zero[f"offload_{part}"] = {"device": device} | ({"nvme_path": path} if path else {})
    return {"zero_optimization": zero}, "the accelerate configuration"


def read_config(named: str) -> dict[str, Any]:
    """Return the configuration in a JSON file, or in the base64 text DeepSpeed's own launcher passes on.

    Raises:
        ConfigError: where there is no such file, it is not JSON, or a section of it is none.
    """
    try:
        is_file = Path(named).is_file()
    except OSError:  # encoded text is too long for a file name
        is_file = False
    try:
        raw = Path(named).read_bytes() if is_file else base64.urlsafe_b64decode(named)
        config = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        found = f"is not JSON ({error})" if is_file else "is no file, and no encoded JSON"
        raise ConfigError(
            f"the DeepSpeed configuration {named!r} {found}; set deepspeed_config_file in the accelerate "
            "configuration to an existing JSON file"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ConfigError(f'{named} has no "zero_optimization" section; add one that names the "stage"')
    problems = [
        f'{named}: "{name}" is {config[name]!r}; expected a section, {{...}}'
        for name in SECTIONS
        if not isinstance(config.get(name, {}), dict)
    ]
    if problems:
        raise ConfigError(problems)
    return config


def declared_precision(config: Mapping[str, Any]) -> str | None:
    """Return the precision the file switches on itself (``bf16`` or ``fp16``), None where it is left open."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True:
            return name
    return None


def fill_auto(config: Mapping[str, Any], recipe: RecipeValues, *, source: str) -> FilledConfig:
    """Fill every ``"auto"`` and collect every contradiction.

    Args:
        config: the DeepSpeed configuration as its author wrote it; not changed.
        recipe: the values to fill in and to compare with.
        source: name of ``config`` in messages.

    Returns:
        The filled configuration, the table of what was filled, and the problems (empty where it can be used).
    """
    filling = _Filling(copy.deepcopy(dict(config)), recipe, source)
    filled, rows, zero = filling.config, filling.rows, filling.config["zero_optimization"]
    for old, new in OLD_OFFLOADS.items():
        if zero.pop(old, False):
            zero.setdefault(new, {"device": "cpu"})
            rows.append((f"zero_optimization.{new}", {"device": "cpu"}, f"by its old name, {old}"))
    for name in SHORT_NAMES:
        if name in zero:
            zero.setdefault(f"stage3_{name}", zero.pop(name))
    filling.compare_optimizer()
    filling.compare_scheduler()
    for key, (value, setting) in recipe.always.items():
        filling.fill(key, value, setting)
    size = 1 if recipe.hidden_size is None else recipe.hidden_size
    # As transformers and accelerate derive them from the width of the model.
    sizes = {
        "zero_optimization.reduce_bucket_size": size * size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * size * size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * size,
    }
    derived = {} if recipe.hidden_size is None else dict.fromkeys(sizes, "the model's hidden size")
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    reasons = derived | {gathers: "swaft exports without gathering the model"}
    for key, reason in reasons.items():
        filling.fill_where_auto(key, sizes.get(key, False), reason)
    block = filled.pop("optimizer", None)
    rows += [
        (f"optimizer.params.{name}", value, f"auto -> {setting}")
        for name, (value, setting) in recipe.optimizer.items()
        if block is not None and block.get("params", {}).get(name) == AUTO
    ]
    if offloads_optimizer(filled):
        rows.append(
            ("optimizer", "DeepSpeedCPUAdam", "in place of torch AdamW, because of offload_optimizer")
        )
    elif block is not None:
        rows.append(("optimizer", "torch AdamW", "the recipe's, with the values of the file's block"))
    if "scheduler" in filled:
        kind = filled.pop("scheduler").get("type", SCHEDULERS[0])
        rows.append(
            ("scheduler", "set aside", f"{kind}: train.lr_scheduler_type and train.warmup_steps set the rate")
        )
    for name in [name for name, value in zero.items() if value == AUTO]:
        if f"zero_optimization.{name}" not in sizes:
            del zero[name]
            rows.append((f"zero_optimization.{name}", "left out", "auto -> DeepSpeed's default"))
    filling.problems += [
        f'{source}: {key} is "auto", and nothing fills that key; write a number there'
        for key in _open_keys(filled)
        if recipe.hidden_size is not None or key not in sizes
    ]
    return FilledConfig(config=filled, rows=rows, problems=filling.problems)


class _Filling:
    """A DeepSpeed configuration while it is filled: what was filled in, and what contradicts the recipe."""

    def __init__(self, config: dict[str, Any], recipe: RecipeValues, source: str):
        self.config, self._recipe, self._source = config, recipe, source
        self.rows: list[tuple[str, Any, str]] = []
        self.problems: list[str] = []

    def fill(self, key: str, value: Any, setting: str) -> None:
        """Write ``value`` where the key is open or missing; note a problem where it says something else."""
        *sections, leaf = key.split(".")
        node = self.config
        for section in sections:
            node = node.setdefault(section, {})
        present = node.get(leaf, "missing")
        if present in (AUTO, "missing"):
            node[leaf] = value
            if present == AUTO or value is not False:
                self.rows.append((key, value, f"{present} -> {setting}"))
        elif present != value:
            self._contradicts(key, present, value, setting)

    def fill_where_auto(self, key: str, value: Any, reason: str) -> None:
        """Write ``value`` where the file says ``auto``; leave a missing key to DeepSpeed's default."""
        section, leaf = key.split(".")
        if self.config[section].get(leaf) == AUTO:
            self.config[section][leaf] = value
            self.rows.append((key, value, f"auto -> {reason}"))

    def compare_optimizer(self) -> None:
        """Note what an optimizer block asks for that differs from the AdamW the recipe builds."""
        kind = self.config.get("optimizer", {}).get("type", "AdamW")
        if kind.lower() not in ("adamw", "adam"):
            self.problems.append(
                f"{self._source} asks for the optimizer {kind}, the recipe trains with AdamW; "
                f'remove the "optimizer" section from {self._source}'
            )
            return
        fixed = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
        built = {name: (value, "the recipe's AdamW") for name, value in fixed.items()}
        self._compare("optimizer", self._recipe.optimizer | built)

    def compare_scheduler(self) -> None:
        """Note what a scheduler block asks for that differs from the recipe's rate; the block is not used."""
        kind = self.config.get("scheduler", {}).get("type", SCHEDULERS[0])
        if kind not in SCHEDULERS:
            self.problems.append(
                f"{self._source} has a scheduler ({kind}), which the recipe would not use; remove that section and "
                "choose the schedule with train.lr_scheduler_type and train.warmup_steps"
            )
            return
        train = self._recipe.train
        wanted = {
            "warmup_min_lr": (0, "where a warm-up begins"),
            "warmup_max_lr": (train.learning_rate, "train.learning_rate"),
            "warmup_num_steps": (train.warmup_steps, "train.warmup_steps"),
            "warmup_type": ("linear", "the kind of warm-up"),
            "total_num_steps": (train.max_steps, "train.max_steps"),
        }
        self._compare("scheduler", wanted)

    def _compare(self, section: str, wanted: Mapping[str, tuple[Any, str]]) -> None:
        """Note the parameters of a section that are written out and differ from what is wanted."""
        params = self.config.get(section, {}).get("params", {})
        for name, (value, setting) in wanted.items():
            if params.get(name, AUTO) not in (AUTO, value):
                self._contradicts(f"{section}.params.{name}", params[name], value, setting)

    def _contradicts(self, key: str, present: Any, value: Any, setting: str) -> None:
        self.problems.append(
            f"{self._source} says {key} = {present}, {self._recipe.source} says {value} ({setting}); "
            f'make them equal, or write "auto" in {self._source}'
        )


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether accelerate swaps the recipe's optimizer for DeepSpeed's on the host, which it does not say."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True)


def _open_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys that still say ``auto``."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _open_keys(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield prefix + name


def environment_problems(environ: Mapping[str, str], train: TrainConfig, zero_stage: Any) -> list[str]:
    """Return the contradictions between single values in the accelerate configuration and everything else.

    accelerate drops these values in silence once a DeepSpeed file is named, and lets its accumulation win
    over the recipe's where none is.
    """
    wanted = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            train.gradient_accumulation_steps,
            "gradient_accumulation_steps",
        ),
        "ACCELERATE_GRADIENT_CLIPPING": (train.max_grad_norm, "gradient_clipping"),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": (zero_stage, "zero_stage"),
    }
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    stage_is = f"{file} says zero_optimization.stage = {zero_stage}" if file != "none" else None
    return [
        f"the accelerate configuration says {name} = {environ[variable]}, but "
        f"{(name == 'zero_stage' and stage_is) or f'the run uses {value}'}; "
        f"remove {name} from the accelerate configuration"
        for variable, (value, name) in wanted.items()
        if environ.get(variable, AUTO) not in (AUTO, "none") and float(environ[variable]) != float(value)
    ]


def offload_problems(environ: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Return where the accelerate configuration offloads and the filled one does not: accelerate drops that."""
    devices = {
        f"offload_{part}": environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        for part in ("optimizer", "param")
    }
    found = {name: (config["zero_optimization"].get(name) or {}).get("device", "none") for name in devices}
    return [
        f"the accelerate configuration says {name}_device = {device}, but the DeepSpeed file says "
        f"zero_optimization.{name}.device = {found[name]}; write it there, and remove {name}_device from the "
        "accelerate configuration"
        for name, device in devices.items()
        if device not in ("none", found[name])
    ]
