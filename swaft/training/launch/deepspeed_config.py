"""Fills a DeepSpeed file full of ``"auto"``, as transformers' Trainer would, from the recipe.

accelerate fills only a few, silently lets a number win over the recipe's, fills ``gradient_clipping`` with 1.0
whatever the recipe says, and drops single values of its own file. Here every value comes from the recipe, a number
that differs is a problem, and every value that was filled in is listed with its source.
"""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError
from swaft.training.config import TrainConfig

AUTO, MISSING = "auto", "missing"
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""DeepSpeed's warmup schedulers; recipes train with no others."""
OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Names that DeepSpeed still accepts but accelerate does not know."""
SHORT_NAMES = (
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
    *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
    *("module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential"),
)
"""Names in ``zero_optimization`` that DeepSpeed accepts with and without the prefix ``stage3_``."""
SIZES: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}
"""Sizes in ``zero_optimization`` by the width of the model, as transformers and accelerate derive them."""
OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""Sections that may be null."""
SECTIONS = ("bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params", *OFFLOADS)
"""Entries of a file that are sections to look into."""
STAGES = (0, 1, 2, 3)

Wanted = Mapping[str, tuple[Any, str]]
"""By key in the file: the recipe's value, and the setting it comes from."""


def recipe_values(
    train: TrainConfig, *, precision: str, world_size: int, hidden_size: int | None = None
) -> dict[str, Wanted]:
    """Return the recipe's values to fill in or compare, by section of a file.

    At the top: every key that exists once a file is filled. Then AdamW's options, and what the recipe's
    schedule has in common with DeepSpeed's warmup. In ``zero_optimization`` a number is the user's choice.

    Args:
        train: section ``train``.
        precision: ``no``, ``bf16`` or ``fp16``, resolved.
        world_size: ranks that train together.
        hidden_size: width of the model, for the bucket sizes of ZeRO; None leaves those keys to accelerate.
    """
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    own = "the recipe's AdamW"
    top = {
        "train_micro_batch_size_per_gpu": (rows, "train.per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.gradient_accumulation_steps"),
        "train_batch_size": (rows * accumulation * world_size, "batch x accumulation x ranks"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (precision == "bf16", "mixed precision"),
        "fp16.enabled": (precision == "fp16", "mixed precision"),
    }
    optimizer = {
        "lr": (train.learning_rate, "train.learning_rate"),
        "weight_decay": (train.weight_decay, "train.weight_decay"),
        "betas": ([train.adam_beta1, train.adam_beta2], "train.adam_beta1 and train.adam_beta2"),
        "eps": (train.adam_epsilon, "train.adam_epsilon"),
        **{"adam_w_mode": (True, own), "bias_correction": (True, own), "amsgrad": (False, own)},
    }
    scheduler = {
        "warmup_min_lr": (0, "the start of the warmup"),
        "warmup_max_lr": (train.learning_rate, "train.learning_rate"),
        "warmup_num_steps": (train.warmup_steps, "train.warmup_steps"),
        "warmup_type": ("linear", "the kind of warmup"),
        "total_num_steps": (train.max_steps, "train.max_steps"),
    }
    gather = "stage3_gather_16bit_weights_on_model_save"
    zero = {gather: (False, "swaft exports without gathering the model")}
    if hidden_size is not None:
        zero |= {key: (size(hidden_size), "the model's hidden size") for key, size in SIZES.items()}
    return {
        "": top,
        "optimizer.params.": optimizer,
        "scheduler.params.": scheduler,
        "zero_optimization.": zero,
    }


@dataclass(frozen=True)
class FilledConfig:
    """A DeepSpeed configuration without ``"auto"``."""

    config: dict[str, Any]
    """The configuration that DeepSpeed gets."""
    rows: list[tuple[str, Any, str]]
    """Key, value and source of every value that was filled in."""
    problems: list[str] = field(default_factory=list)
    """Contradictions between the file and the recipe, each a complete message."""


def uses_deepspeed(environ: Mapping[str, str]) -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def named_file(environ: Mapping[str, str]) -> str | None:
    """Return the DeepSpeed file that the launcher's file names, or its encoded text; None: it names none."""
    named = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if named == "none" else named


def stage_of(config: Mapping[str, Any]) -> Any:
    """Return the ZeRO stage in a DeepSpeed configuration: 0 where it says none, as DeepSpeed reads it."""
    return config["zero_optimization"].get("stage", 0)


def launcher_config(environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Return the DeepSpeed configuration that ``accelerate launch`` announced, and a name for it.

    Args:
        environ: the process environment; the launcher sets ``ACCELERATE_DEEPSPEED_CONFIG_FILE`` if its
            file names a JSON file, and otherwise single values such as ``ACCELERATE_DEEPSPEED_ZERO_STAGE``.

    Raises:
        ConfigError: the file cannot be read, or has no valid ZeRO stage.
    """
    named = named_file(environ)
    if named is None:
        config, source = _of_single_values(environ), "the accelerate configuration"
    else:
        config, source = read_config(named), named if len(named) < 200 else "the DeepSpeed configuration"
    if (stage := stage_of(config)) not in STAGES:
        raise ConfigError(f"{source}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    return config, source


def _of_single_values(environ: Mapping[str, str]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part, device in _offloads(environ).items():
        path = environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_NVME_PATH")
        zero[part] = {"device": device} | ({"nvme_path": path} if path else {})
    return {"zero_optimization": zero}


def read_config(named: str) -> dict[str, Any]:
    """Return the configuration in a JSON file, or in the base64 text that DeepSpeed's own launcher passes on.

    Raises:
        ConfigError: there is no such file, it is not JSON, or one of its sections is not a section.
    """
    is_file = os.path.isfile(named)
    try:
        raw = Path(named).read_bytes() if is_file else base64.urlsafe_b64decode(named)
        config = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        found = f"is not JSON ({error})" if is_file else "is neither a file nor encoded JSON"
        raise ConfigError(
            f"the DeepSpeed configuration {named!r} {found}; set deepspeed_config_file in the accelerate "
            f"configuration to an existing JSON file (relative names start in {Path.cwd()})"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise ConfigError(f'{named} has no "zero_optimization" section; add one that sets the "stage"')
    if "bfloat16" in config:  # an older name, which DeepSpeed reads if the other is missing
        config.setdefault("bf16", config.pop("bfloat16"))
    found = {path: _entry(config, path) for path in SECTIONS}
    problems = [
        f'{named}: "{path}" is {value!r}; expected a section, {{...}}'
        for path, value in found.items()
        if not isinstance(value, dict) and not (value is None and path in OFFLOADS)
    ]
    if problems:
        raise ConfigError(problems)
    return config


def _entry(config: Any, path: str) -> Any:
    """Return the entry under a dotted name; an empty section if it, or one of its parents, is missing."""
    for name in path.split("."):
        config = config.get(name, {}) if isinstance(config, dict) else {}
    return config


def declared_precision(config: Mapping[str, Any]) -> str | None:
    """Return the precision that the file itself switches on (``bf16`` or ``fp16``), None if it is left open."""
    on = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    return on[0] if on else None


def fill_auto(config: Mapping[str, Any], wanted: Mapping[str, Wanted], *, source: str) -> FilledConfig:
    """Fill every ``"auto"`` and collect every contradiction.

    Args:
        config: the DeepSpeed configuration as its author wrote it; not modified.
        wanted: the values to fill in and to compare with, from `recipe_values`.
        source: name of ``config`` in messages.

    Returns:
        The filled configuration, the table of what was filled, and the problems (empty if it can be used).
    """
    filled, rows, problems = copy.deepcopy(dict(config)), list[tuple[str, Any, str]](), list[str]()
    zero = filled["zero_optimization"]

    def settle(prefix: str, *, fills: Sequence[str] = (AUTO,), compares: bool = True) -> None:
        """Write the recipe's values where the file has one of `fills`; report other values that differ."""
        for name, (value, setting) in wanted[prefix].items():
            *sections, leaf = f"{prefix}{name}".split(".")
            node = filled
            for section in sections:
                node = node.setdefault(section, {}) if MISSING in fills else node.get(section, {})
            found = node.get(leaf, MISSING)
            if found in fills:
                node[leaf] = value
                if found == AUTO or value is not False:
                    rows.append((f"{prefix}{name}", value, f"{found} -> {setting}"))
            elif compares and found not in (AUTO, MISSING, value):
                problems.append(
                    f"{source} says {prefix}{name} = {found}, but {setting} of this run is {value}; make them "
                    f'equal, or write "auto" there'
                )

    for old, new in OLD_OFFLOADS.items():
        if zero.pop(old, False):
            zero.setdefault(new, {"device": "cpu"})
            rows.append((f"zero_optimization.{new}", {"device": "cpu"}, f"by its old name, {old}"))
    for name in SHORT_NAMES:
        if name in zero:
            zero.setdefault(f"stage3_{name}", zero.pop(name))
    optimizer, scheduler = filled.get("optimizer"), filled.get("scheduler")
    trains_with = str((optimizer or {}).get("type", "AdamW"))
    if trains_with.lower() in ("adamw", "adam"):
        settle("optimizer.params.")
    else:
        problems.append(
            f"{source} asks for the optimizer {trains_with}, but the recipe trains with AdamW; "
            f'remove the "optimizer" section from {source}'
        )
    kind = (scheduler or {}).get("type", SCHEDULERS[0])
    if kind in SCHEDULERS:
        settle("scheduler.params.", fills=())
    else:
        problems.append(
            f"{source} has a scheduler ({kind}), which the recipe would not use; remove that section and "
            "choose the schedule with train.lr_scheduler_type and train.warmup_steps"
        )
    settle("", fills=(AUTO, MISSING))
    settle("zero_optimization.", compares=False)
    if "timers" not in filled:
        filled["timers"] = {"throughput": {"enabled": False}}
        rows.append(("timers.throughput.enabled", False, "it would wait for the device at every pass"))
    if offloads_optimizer(filled):
        rows.append(("optimizer", "DeepSpeedCPUAdam", "replaces torch AdamW, because of offload_optimizer"))
    elif optimizer is not None:
        rows.append(("optimizer", "torch AdamW", "the recipe's, with the values of the file's block"))
    if scheduler is not None:
        reason = f"{kind}: train.lr_scheduler_type and train.warmup_steps set the rate"
        rows.append(("scheduler", "set aside", reason))
    for name in [name for name, value in zero.items() if value == AUTO and name not in SIZES]:
        del zero[name]
        rows.append((f"zero_optimization.{name}", "left out", "auto -> DeepSpeed's default"))
    for name in ("optimizer", "scheduler"):
        filled.pop(name, None)
    problems += [
        f'{source}: {key} is "auto", and nothing fills that key; write a number there'
        for key in _open_keys(filled)
        if key not in [f"zero_optimization.{name}" for name in SIZES]
    ]
    return FilledConfig(config=filled, rows=rows, problems=problems)


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether accelerate silently replaces the recipe's optimizer by DeepSpeed's on the host."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True)


def launcher_problems(environ: Mapping[str, str], train: TrainConfig, config: Mapping[str, Any]) -> list[str]:
    """Return the contradictions between single values in the accelerate configuration and everything else.

    accelerate silently drops these values if a DeepSpeed file is given, and lets its accumulation win
    over the recipe's if none is.
    """
    file, stage = named_file(environ), stage_of(config)
    wanted = {
        "GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", train.gradient_accumulation_steps),
        "GRADIENT_CLIPPING": ("gradient_clipping", train.max_grad_norm),
        "DEEPSPEED_ZERO_STAGE": ("zero_stage", stage),
    }
    problems = []
    for variable, (name, value) in wanted.items():
        said, other = environ.get(f"ACCELERATE_{variable}", AUTO), f"the run uses {value}"
        if name == "zero_stage" and file is not None:
            other = f"{file} says zero_optimization.stage = {stage}"
        if said not in (AUTO, "none") and float(said) != float(value):
            problems.append(
                f"the accelerate configuration says {name} = {said}, but {other}; remove {name} from the "
                "accelerate configuration"
            )
    for part, device in _offloads(environ).items():
        found = (config["zero_optimization"].get(part) or {}).get("device", "none")
        if device != found:
            problems.append(
                f"the accelerate configuration says {part}_device = {device}, but the DeepSpeed file says "
                f"zero_optimization.{part}.device = {found}; write it there, and remove {part}_device from the "
                "accelerate configuration"
            )
    return problems


def _offloads(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the accelerate configuration offloads, by DeepSpeed's name for the part, and to which device."""
    parts = ("offload_optimizer", "offload_param")
    devices = {part: environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none") for part in parts}
    return {part: device for part, device in devices.items() if device != "none"}


def _open_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the keys that are still ``auto``."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _open_keys(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield prefix + name
