"""Finds what DeepSpeed would refuse in a filled configuration, or ignore (a misspelt name), before any rank starts.

DeepSpeed's own classes parse it, section by section, so that every faulty section is reported. What they refuse
only once an engine starts is found here too.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from swaft.averaging.engines.deepspeed import refused_settings
from swaft.options import suggestion
from swaft.training.launch.deepspeed_extension import reason_op_cannot_be_built

BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
"""Without these DeepSpeed parses nothing."""
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Sections that start one of DeepSpeed's loggers, and the packages they need."""
MISSPELT = 0.85
"""Similarity (difflib) from which an unknown name is taken for a misspelt one."""


def deepspeed_problems(config: Mapping[str, Any], *, source: str) -> tuple[list[str], list[str]]:
    """Return what DeepSpeed, or swaft under DeepSpeed, refuses in a configuration.

    Args:
        config: the filled configuration; ``auto`` may be left where accelerate fills it.
        source: name of the configuration in messages.

    Returns:
        The problems, each a complete message, and the entries that DeepSpeed does not know and ignores.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return ["the launcher asks for DeepSpeed, which is not installed; install swaft[deepspeed]"], []
    sound, found = dict[str, Any](BATCH), list[str]()
    names = [name for name in config if name != "train_batch_size"]  # it needs the ranks
    for name in sorted(names, key=lambda name: name != "zero_optimization"):  # others need its stage
        faults = list(_unparsed(sound | {name: config[name]}, name))
        found += faults
        sound |= {} if faults else {name: config[name]}
    parsed = _parse(sound)
    read: _Read = parsed._param_dict
    sections = [(f"{name}.", value) for name, value in read.items() if isinstance(value, _Read)]
    refused = refused_settings(parsed)
    found += [f"sets {setting}, which swaft does not train with; turn it off" for setting in refused]
    found += [f"sets {sentence}" for sentence in _refused_at_the_start(parsed)]
    found += [
        f"sets {prefix}{name}, which DeepSpeed does not have. Did you mean '{known}'?"
        for prefix, section in [("", read), *sections]
        for name, known in section.misspelt().items()
    ]
    ignored = [name for name in read if name not in read.asked and name not in read.misspelt()]
    return [f"{source} {problem}" for problem in found], ignored


class _Read(dict[str, Any]):
    """A section that remembers which entries DeepSpeed looks for, whether they exist or not.

    Sections that DeepSpeed unpacks whole (its pydantic models, which catch misspelt names) remember none.
    """

    def __init__(self, entries: Mapping[str, Any]):
        super().__init__(
            {name: _Read(value) if isinstance(value, dict) else value for name, value in entries.items()}
        )
        self.asked: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self  # so that `name in section.keys()` is remembered as well

    def misspelt(self) -> dict[str, str]:
        """Return entries that nobody looked for but whose name nearly matches a known one, and that name."""
        near = {
            name: get_close_matches(name, self.asked, n=1, cutoff=MISSPELT) for name in {*self} - self.asked
        }
        return {name: names[0] for name, names in near.items() if names}


def _parse(entries: Mapping[str, Any]) -> Any:
    """Return DeepSpeed's own parsed configuration, without its log lines, which appear again when it starts."""
    from deepspeed.runtime.config import DeepSpeedConfig  # imported here: takes seconds

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return DeepSpeedConfig(_Read(entries))
    finally:
        logger.setLevel(level)


def _unparsed(entries: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield what DeepSpeed refuses while it parses these entries, if the named one is at fault."""
    import deepspeed
    from pydantic import ValidationError

    by = f"DeepSpeed {deepspeed.__version__}"
    try:
        _parse(entries)
    except ValidationError as error:
        for fault in error.errors():
            inside = fault["loc"][fault["loc"][:1] == (name,) :]  # monitors include their own name
            path = ".".join([name, *map(str, inside)])
            if fault["type"] == "extra_forbidden":
                near = suggestion(str(fault["loc"][-1]), _settings(error.title, fault["loc"][:-1]))
                yield f"sets {path}, which {by} does not have.{near or ' Remove it'}"
            else:
                yield f"sets {path}, which {by} refuses: {fault['msg']}"
    except Exception as error:  # assertions, its own types, and errors from values of a wrong type
        yield f"sets {name}, which {by} refuses: {error or type(error).__name__}"


def _settings(model_name: str, path: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the field names of one of DeepSpeed's models, or of a model nested in it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel as Model

    model: Any = next((each for each in Model.__subclasses__() if each.__name__ == model_name), None)
    if model is None:
        return ()
    for name in path:
        kind = model.model_fields[name].annotation
        model = next(
            each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, Model)
        )
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _refused_at_the_start(parsed: Any) -> Iterator[str]:
    """Yield what DeepSpeed parses but then fails on, or what makes a step differ from the recipe's."""
    from deepspeed.runtime.config import DtypeEnum

    zero, stage = parsed.zero_config, parsed.zero_optimization_stage
    offload = zero.offload_optimizer
    if zero.legacy_stage1:
        yield "zero_optimization.legacy_stage1, which DeepSpeed no longer has; remove it"
    if not zero.compute_grad_norm and parsed.gradient_clipping > 0:
        yield "zero_optimization.compute_grad_norm = false, without which gradients are not clipped; remove it"
    if stage in (1, 2) and zero.allgather_bucket_size % 2:
        yield f"zero_optimization.allgather_bucket_size = {zero.allgather_bucket_size}; expected an even number"
    scales_before = parsed.prescale_gradients or parsed.gradient_predivide_factor != 1.0
    if stage >= 2 and zero.reduce_scatter and scales_before:
        yield (
            "prescale_gradients or gradient_predivide_factor, which stages 2 and 3 take only with "
            "zero_optimization.reduce_scatter = false; remove it"
        )
    if parsed.gradient_allreduce_op != "mean":
        yield f"gradient_allreduce_op = {parsed.gradient_allreduce_op}, but the recipe takes the mean; remove it"
    if not parsed.managed_gradient_accumulation:
        yield "managed_gradient_accumulation = false, but accelerate accumulates; remove it"
    if (parsed.checkpoint_config.get("writer") or {}).get("decoupled"):
        yield "checkpoint.writer.decoupled, which still writes when the checkpoint should be complete; remove it"
    on_host = offload is not None and offload.device == "cpu" and parsed.zero_force_ds_cpu_optimizer
    if on_host and (reason := reason_op_cannot_be_built("cpu_adam")):
        yield (
            f"zero_optimization.offload_optimizer.device = cpu, for which DeepSpeed builds cpu_adam: {reason}. "
            'Or keep torch\'s AdamW with "zero_force_ds_cpu_optimizer": false'
        )
    computes_in = (
        "fp16" if parsed.float16_config.enabled else "bf16" if parsed.bfloat16_config.enabled else "fp32"
    )
    for name in ("param_dtype", "grad_accum_dtype", "buffer_dtype"):
        value = getattr(parsed, name)
        try:
            differs = value is not None and DtypeEnum(value) is not DtypeEnum[computes_in]
        except ValueError:
            yield f"data_types.{name} = {value!r}; expected fp32, bf16 or fp16"
            continue
        if differs and (name == "param_dtype" or (name == "grad_accum_dtype" and stage == 0)):
            yield f"data_types.{name} = {value}, but the run computes in {computes_in}; remove it"
    for section, package in MONITORS.items():
        is_on = getattr(parsed.monitor_config, section).enabled
        if is_on and importlib.util.find_spec(package) is None:
            yield f"{section}.enabled, which needs the package {package}; install it, or turn it off"
