"""Builds the configuration of a run: defaults, then each `--config` file in order, then the command line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from swaft.errors import ConfigError
from swaft.options import Option
from swaft.training.config.check import check_config
from swaft.training.config.layers import COMMAND_LINE, Layer, fill_in, merge, parse_arguments, read_file
from swaft.training.config.render import help_text, to_yaml
from swaft.training.config.values import coerce, sections, settings

logger = logging.getLogger(__name__)

# Flags of the Trainer and of its examples that are called otherwise here.
HUGGING_FACE_NAMES = {
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
}

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class Reading(Generic[ConfigT]):
    """What files and the command line say."""

    config: ConfigT
    """A faulty setting stands at its default."""
    origins: dict[str, str]
    """Where each setting comes from, by its full name."""
    replaced: list[str]
    """Which rows were put in the place of which, as sentences."""
    problems: list[str]
    """Everything that is wrong."""


def load_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Return the configuration a command line asks for, checked.

    Accepts `--config FILE` (repeatable, later files win), overrides as `a.b=c`, `--a.b=c` or `--a.b c`,
    and `--help` and `--print_config`, which print and exit 0. Logs which rows take the place of others.

    Args:
        config_class: a dataclass of section dataclasses, such as `ClassificationConfig`.
        argv: the arguments after the program's name.

    Raises:
        ConfigError: with every problem found, each led by the full name of its setting.
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
    """Read and check a configuration, and continue where something is wrong with it.

    Args:
        config_class: a dataclass of section dataclasses.
        argv: config files and overrides, as for `load_config`.
    """
    known = settings(config_class)
    paths, overrides, problems = parse_arguments(argv)
    layers = [read_file(path, problems) for path in paths]
    values, origins, replaced = merge([*layers, Layer(COMMAND_LINE, overrides)])
    values = fill_in(values, known, problems)
    typed = _typed(values, origins, known, problems)
    config = _instantiate(config_class, known, typed)
    # A setting that is already on the list stands at its default now: no second problem about that.
    faulty = _leaders(problems)
    problems += [problem for problem in check_config(config) if not _leaders([problem]) & faulty]
    return Reading(config=config, origins=origins, replaced=replaced, problems=problems)


def _typed(
    values: Mapping[str, Any], origins: Mapping[str, str], known: Mapping[str, Option], problems: list[str]
) -> dict[str, Any]:
    """Bring values into their settings' types; what does not fit or is missing is added to the problems."""
    typed = {}
    for name, value in values.items():
        if value is None and _is_section(name, known):
            continue  # all its lines are commented out: empty, not wrong
        if name not in known:
            problems.append(f"{name}: no such setting ({origins[name]}).{_nearest_setting(name, known)}")
            continue
        try:
            typed[name] = coerce(value, known[name])
        except ValueError as error:
            problems.append(f"{name}: {error} ({origins[name]})")
    missing = {name for name, option in known.items() if option.required} - typed.keys() - _leaders(problems)
    problems += [
        f"{name}: has to be given; set it in a config, or as {name}=... on the command line"
        for name in known
        if name in missing
    ]
    return typed


def _leaders(problems: Sequence[str]) -> set[str]:
    """Name the settings that the problems are about."""
    return {problem.split(":")[0] for problem in problems}


def _instantiate(
    config_class: type[ConfigT], known: Mapping[str, Option], typed: Mapping[str, Any]
) -> ConfigT:
    # A required setting that is missing has its problem on the list and gets a stand-in here.
    stand_ins = {name: "" for name, option in known.items() if option.required}
    given: dict[str, dict[str, Any]] = {section: {} for section in sections(config_class)}
    for name, value in {**stand_ins, **typed}.items():
        section, setting = name.split(".")
        given[section][setting] = value
    return config_class(
        **{section: kind(**given[section]) for section, kind in sections(config_class).items()}
    )


def _nearest_setting(name: str, known: Mapping[str, Option]) -> str:
    """Hint at the setting that was probably meant: by the leaf's name first, then by its spelling."""
    if _is_section(name, known):
        return f" '{name}' is a section: put its settings under it, or write {name}.setting=value."
    section, _, leaf = name.replace("-", "_").rpartition(".")
    by_leaf = {path.split(".")[1]: path for path in known}
    meant = HUGGING_FACE_NAMES.get(leaf, leaf)
    leaf = meant if leaf not in by_leaf and meant in by_leaf else leaf
    # Within a section that exists, only its own settings: nobody means averaging.start by train.stat.
    own = {short: path for short, path in by_leaf.items() if path.startswith(f"{section}.")} or by_leaf
    near = leaf if leaf in by_leaf else next(iter(get_close_matches(leaf, list(own), n=1)), None)
    return f" Did you mean '{by_leaf[near]}'?" if near else " --help lists every setting."


def _is_section(name: str, known: Mapping[str, Option]) -> bool:
    return any(path.startswith(f"{name}.") for path in known)


def _leave(text: str) -> None:
    """Print and exit 0; of several processes that were launched together only the first prints."""
    if os.environ.get("RANK", "0") == "0":
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read it has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
