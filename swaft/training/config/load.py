"""Reads a configuration (defaults, then each `--config` file in order, then the command line), and writes it.

It reports settings that cannot work before a model or a row is loaded, and builds the averaging rule that they
describe.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swaft.averaging.rules import RULES, Plan, PowerEMA, Rule
from swaft.distributed import is_first_rank
from swaft.errors import ConfigError, one_line
from swaft.options import Option, check, docs_of, options_of
from swaft.training.config.schema import AveragingConfig, RecipeConfig, Section
from swaft.training.config.values import (
    chosen_options,
    coerce,
    sections,
    settings,
    settings_of,
    split_words,
    type_name,
    written,
)

logger = logging.getLogger(__name__)


def check_config(config: Any) -> list[str]:
    """Return every problem of a configuration; each message starts with the name of its setting or section.

    Args:
        config: a `RecipeConfig`, or any other dataclass of section dataclasses.
    """
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    problems = [
        f"{name}.{setting}: {fault}"
        for name, section in parts.items()
        for setting, fault in check(section) or (section.conflicts() if isinstance(section, Section) else ())
    ]
    if problems or not isinstance(config, RecipeConfig):
        return problems
    problems += [f"{setting}: {fault}" for setting, fault in config.conflicts()]
    if config.train.max_steps > 0:
        problems += check_averaging(config.averaging, config.train.max_steps)
    return problems


def check_averaging(averaging: AveragingConfig, total_steps: int) -> list[str]:
    """Problems that appear once the length of the run is known: options that do not fit it or each other."""
    try:
        plan_rule(build_rule(averaging), total_steps)
    except ConfigError as error:
        return error.problems
    return []


def build_rule(averaging: AveragingConfig) -> Rule | None:
    """Return the averaging rule, None for ``rule: none``.

    Args:
        averaging: section ``averaging``, whose options are named like the arguments of the rules; null leaves
            the choice to the rule.

    Raises:
        ConfigError: an option is set that the rule would not use, or one that it needs is missing.
    """
    kind = RULES.get(averaging.rule)
    options = chosen_options(averaging, kind)
    if averaging.start is not None:
        options["start"] = averaging.start
    if averaging.sigma_rel is not None:
        # This width is tracked, so it is exact at every evaluation. Other widths are put together from it and a
        # second one.
        others = [each for each in PowerEMA().sigma_rel if each != averaging.sigma_rel]
        options["sigma_rel"] = (averaging.sigma_rel, others[-1])
    return None if kind is None else kind(every=averaging.every, **options)


def plan_rule(rule: Rule | None, total_steps: int) -> Plan | None:
    """Return the averaging events of a run of ``total_steps`` optimizer steps, None without a rule.

    Raises:
        ConfigError: the rule does not fit.
    """
    with settings_of("averaging"):
        return None if rule is None else rule.plan(total_steps)


USAGE = """\
usage: accelerate launch [--config_file FILE] RECIPE --config FILE ... [section.name=value ...]

  --config FILE        YAML settings; repeatable, later files override earlier ones
  section.name=value   one setting; overrides every file (--section.name value works too)
  --print_config       print the resolved settings with their origins, and exit
  --help               print this page, and exit
"""
HELP_WIDTH = 100

# A file or command line that sets one of these brings its own rows: earlier settings about rows are dropped.
ROW_SOURCES = ("data.task_name", "data.dataset_name", "data.train_file")
ROW_SETTINGS = (
    *ROW_SOURCES,
    "data.dataset_config_name",
    "data.validation_file",
    "data.test_file",
    "data.delimiter",
    "data.eval_languages",
)
# Flags of the Trainer and its examples that have another name here, and usual short forms.
OTHER_NAMES = {
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "warmup_ratio": "warmup_steps",
    "validation_split_percentage": "validation_fraction",
    "sep": "delimiter",
    "max_length": "max_seq_length",
    "tokenizer_name_or_path": "tokenizer_name",
    "label_smoothing": "label_smoothing_factor",
    "generation_num_beams": "num_beams",
    "generation_max_length": "max_new_tokens",
    "val_max_target_length": "max_new_tokens",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "text_column": "source_column",
    "summary_column": "target_column",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class Reading(Generic[ConfigT]):
    """What was read from files and the command line."""

    config: ConfigT
    """The configuration, with faulty settings at their defaults."""
    origins: dict[str, str]
    """Where each setting comes from, by its full name: the path of a file, or ``command line``."""
    replaced: list[str]
    """Which rows or choices replaced which settings, as sentences."""
    problems: list[str]
    """Everything that is wrong."""


def load_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Return the checked configuration that a command line asks for.

    Accepts `--config FILE` (repeatable, later files win), overrides as `a.b=c`, `--a.b=c` or `--a.b c`,
    and `--help` and `--print_config`, which print and exit 0. Logs which settings of earlier
    files are replaced by other rows, or by another choice that does not use them.

    Args:
        config_class: a dataclass of section dataclasses, such as `ClassificationConfig`.
        argv: the arguments after the program's name.

    Raises:
        ConfigError: with every problem found, each starting with the full name of its setting.
    """
    if "--help" in argv or "-h" in argv:
        _leave(help_text(config_class))
    read = read_config(config_class, [word for word in argv if word != "--print_config"])
    if read.problems:
        raise ConfigError(read.problems)
    if "--print_config" in argv:
        _leave(to_yaml(read.config, read.origins))
    for sentence in read.replaced:
        logger.info("%s", sentence)
    return read.config


def read_config(config_class: type[ConfigT], argv: Sequence[str]) -> Reading[ConfigT]:
    """Read and check a configuration, and carry on past problems to collect them all.

    Args:
        config_class: a dataclass of section dataclasses.
        argv: config files and overrides, as for `load_config`.
    """
    known, problems = settings(config_class), list[str]()
    values, origins, replaced = _merge(_read_layers(argv, problems), config_class)
    typed = dict[str, Any]()
    for name, value in _fill_in(values, known, problems).items():
        if value is None and _is_section(name, known):
            continue  # all its lines are commented out: empty, not wrong
        if name not in known:
            problems.append(f"{name}: no such setting ({origins[name]}).{_nearest_setting(name, known)}")
            continue
        try:
            typed[name] = coerce(value, known[name])
        except ValueError as error:
            problems.append(f"{name}: {error} ({origins[name]})")
    problems += [
        f"{name}: is required; set it in a config, or as {name}=... on the command line"
        for name, option in known.items()
        if option.required and name not in {*typed, *leaders(problems)}
    ]
    # A setting with a problem gets its default, or an empty text if it has none, so as not to be reported twice.
    stand_ins = {name: "" for name, option in known.items() if option.required}
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections(config_class)}
    for name, value in {**stand_ins, **typed}.items():
        section, setting = name.split(".")
        parts[section][setting] = value
    config = config_class(**{name: kind(**parts[name]) for name, kind in sections(config_class).items()})
    faulty = leaders(problems)
    # If a choice has a problem, it is not known which settings of its section are used.
    unsure = tuple(f"{choice.split('.')[0]}." for choice in _choices(config_class) if choice in faulty)
    problems += [
        problem
        for problem in check_config(config)
        if not leaders([problem]) & faulty and not problem.startswith(unsure)
    ]
    return Reading(config=config, origins=origins, replaced=replaced, problems=problems)


def to_yaml(config: Any, origins: dict[str, str] | None = None) -> str:
    """Write the configuration as YAML that `load_config` reads back to the same configuration.

    Args:
        config: a configuration dataclass.
        origins: full name to the value's origin; each becomes a comment at the end of its line.
    """
    lines = []
    for section, values in dataclasses.asdict(config).items():
        lines.append(f"{section}:")
        for name, value in values.items():
            content = OmegaConf.create({name: _escaped(value)})
            text = textwrap.indent(OmegaConf.to_yaml(content).rstrip("\n"), "  ")
            origin = (origins or {}).get(f"{section}.{name}")
            lines.append(f"{text}  # {origin}" if origin else text)
    return "\n".join(lines) + "\n"


def _escaped(value: Any) -> Any:
    """Escape `${`, and backslashes before it, in a value, because reading it back would interpolate it."""
    if isinstance(value, dict):
        return {name: _escaped(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def flatten(config: Any) -> dict[str, str | int | float | bool]:
    """Flatten the configuration for trackers: full name to value, with null and mappings as JSON text."""
    return {
        f"{section}.{name}": json.dumps(value) if value is None or isinstance(value, dict) else value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }


def help_text(config_class: type) -> str:
    """Return the help page: every setting with type, default and doc, section by section."""
    blocks = [USAGE]
    for section, kind in sections(config_class).items():
        blocks.append(f"\n{section}: {(kind.__doc__ or '').splitlines()[0]}\n")
        docs, indent = docs_of(kind), " " * 6
        for name, option in options_of(kind).items():
            default = "required" if option.required else f"default {written(option.default)}"
            body = textwrap.fill(
                docs.get(name, ""), HELP_WIDTH, initial_indent=indent, subsequent_indent=indent
            )
            blocks.append(f"  {section}.{name}  <{type_name(option)}>  [{default}]\n{body}\n")
    return "".join(blocks)


def _read_layers(argv: Sequence[str], problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the origin and settings (full name to value, not yet checked) of each file and the command line."""
    layers = []
    overrides = dict[str, Any]()
    for words, name, value in split_words(argv):
        if value is None and words[0].startswith("--"):
            problems.append(f"--{name}: has no value; write --{name} VALUE")
        elif value is None:
            advice = "write section.name=value, or --config FILE for each file"
            problems.append(f"'{name}': not understood; {advice}")
        elif name != "config":
            overrides[name] = value
        else:
            try:
                layers.append((value, dict(_read_file(value))))
            except ValueError as error:
                problems.append(f"--config {value}: {error}")
    return [*layers, ("command line", overrides)]


def _read_file(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the full name and value of each setting in a YAML file.

    Raises:
        ValueError: says what is wrong with the file.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}); give the path of a YAML file"
        raise ValueError(reason) from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError("expected sections such as `train:` with settings under them")
    for section, values in content.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            yield str(section), values


def _merge(
    layers: Sequence[tuple[str, Mapping[str, Any]]], config_class: type
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Merge the layers; later ones override earlier ones.

    A layer that sets a source of rows (a task, a dataset, a training file) replaces the whole source of the
    layers before it, so that one config's validation file is never combined with another's training file. One that
    makes the choice of a section (``noise.kind``) removes the earlier settings that this choice does not use.

    Returns:
        Full name to value, full name to origin, and a sentence about each source or choice that replaced something.
    """
    values, origins, replaced = dict[str, Any](), dict[str, str](), list[str]()
    for origin, layer in layers:
        for reason, names in _replacing(layer, values, config_class):
            dropped = [
                f"{name}={written(values[name])} ({origins[name]})"
                for name in names
                if values.get(name) not in (None, layer.get(name))
            ]
            if dropped:
                replaced.append(f"{reason} ({origin}) replaces {', '.join(dropped)}")
            for name in names:
                values.pop(name, None)
                origins.pop(name, None)
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return values, origins, replaced


def _replacing(
    layer: Mapping[str, Any], values: Mapping[str, Any], config_class: type
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each source or choice in a layer, in words, and which earlier settings (``values``) it replaces."""
    if named := [f"{name}={layer[name]}" for name in ROW_SOURCES if layer.get(name) is not None]:
        yield " and ".join(named), ROW_SETTINGS
    known = settings(config_class)
    for choice, kind in _choices(config_class).items():
        try:
            chosen = written(coerce(layer[choice], known[choice]))
        except (KeyError, ValueError):  # no choice in this layer, or one invalid or still to be filled in
            continue
        unused = list[str]()
        for name in kind.users:
            value = values.get(full := f"{choice.partition('.')[0]}.{name}")
            # A value that is still to be filled in may turn out to be any.
            users = kind.users[name] if "${" in str(value) else kind.users_of(name, value)
            unused += [full] if chosen not in users else []
        yield f"{choice}={chosen}", unused


def _choices(config_class: type) -> dict[str, type[Section]]:
    """Return the sections in which one setting decides which others are used, by the full name of that setting."""
    kinds = sections(config_class).values()
    return {kind.choice: kind for kind in kinds if issubclass(kind, Section) and kind.choice}


def _fill_in(values: dict[str, Any], known: Mapping[str, Option], problems: list[str]) -> dict[str, Any]:
    """Interpolate `${train.seed}` and `${oc.env:HOME}` by OmegaConf's rules, inside mappings too."""
    defaults = {name: option.default for name, option in known.items() if not option.required}
    container, resolved = OmegaConf.create(), dict(values)

    @contextmanager
    def noting(name: str) -> Iterator[None]:
        try:
            yield
        except OmegaConfBaseException as error:
            del resolved[name]
            problems.append(f"{name}: '{values[name]}' cannot be filled in: {str(error).splitlines()[0]}")

    for name, value in {**defaults, **values}.items():
        if name in known:
            with noting(name):
                OmegaConf.update(container, name, value)
    for name, value in list(resolved.items()):
        if name in known and "${" in str(value):
            with noting(name):
                found = OmegaConf.select(container, name, throw_on_missing=True)
                resolved[name] = (
                    OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
                )
    return resolved


def leaders(problems: Sequence[str]) -> set[str]:
    """Name the settings that the problems are about."""
    return {problem.split(":")[0] for problem in problems}


def _is_section(name: str, known: Mapping[str, Option]) -> bool:
    return any(path.startswith(f"{name}.") for path in known)


def _nearest_setting(name: str, known: Mapping[str, Option]) -> str:
    """Suggest the setting that was probably meant: by its exact name first, then by similar spelling."""
    if _is_section(name, known):
        return f" '{name}' is a section: put its settings under it, or write {name}.setting=value."
    section, _, leaf = name.replace("-", "_").rpartition(".")
    by_leaf = {path.split(".")[1]: path for path in known}
    meant = OTHER_NAMES.get(leaf, leaf)
    leaf = meant if leaf not in by_leaf and meant in by_leaf else leaf
    # Within an existing section, suggest only its own settings: train.stat does not mean averaging.start.
    own = {short: path for short, path in by_leaf.items() if path.startswith(f"{section}.")} or by_leaf
    near = leaf if leaf in by_leaf else next(iter(get_close_matches(leaf, list(own), n=1)), None)
    return f" Did you mean '{by_leaf[near]}'?" if near else " --help lists every setting."


def _leave(text: str) -> None:
    """Print and exit 0; if several processes were launched together, only the first prints."""
    if is_first_rank():
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
