"""Reads settings from files and the command line, and lays them over one another, later over earlier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swaft.options import Option

COMMAND_LINE = "command line"

# A layer that names one of these brings its own rows: what earlier layers say about rows is dropped.
ROW_SOURCES = ("data.task_name", "data.dataset_name", "data.train_file")
ROW_SETTINGS = (
    *ROW_SOURCES,
    "data.dataset_config_name",
    "data.validation_file",
    "data.test_file",
    "data.delimiter",
    "data.eval_languages",
)


@dataclass(frozen=True)
class Layer:
    """Settings from one place, not yet checked."""

    origin: str
    """Where they come from: the path of a file, or `command line`."""
    values: dict[str, Any]
    """Full name to value, as YAML read it or as typed."""


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Lay the layers over one another, later over earlier.

    A layer that names a source of rows (a task, a dataset, a training file) replaces the source of the
    layers below it whole, so that a config's validation file never meets another's training file.

    Returns:
        Full name to value, full name to origin, and a sentence about each source that was replaced.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    replaced: list[str] = []
    for layer in layers:
        named = [f"{name}={value}" for name in ROW_SOURCES if (value := layer.values.get(name)) is not None]
        if named:
            dropped = [
                f"{name}={values[name]} ({origins[name]})"
                for name in ROW_SETTINGS
                if values.get(name) not in (None, layer.values.get(name))
            ]
            if dropped:
                replaced.append(
                    f"{' and '.join(named)} ({layer.origin}) takes the place of {', '.join(dropped)}"
                )
            for name in ROW_SETTINGS:
                values.pop(name, None)
                origins.pop(name, None)
        values |= layer.values
        origins |= dict.fromkeys(layer.values, layer.origin)
    return values, origins, replaced


def parse_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Split arguments into config paths, overrides as typed, and problems."""
    paths: list[str] = []
    overrides: dict[str, str] = {}
    problems: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and not word.startswith("--"):
            problems.append(
                f"'{word}': not understood; write section.name=value, or --config FILE for each file"
            )
            continue
        if not equals and (not words or words[0].startswith("--")):
            problems.append(f"--{name}: has no value; write --{name} VALUE")
            continue
        value = value if equals else words.pop(0)
        if name == "config":
            paths.append(value)
        else:
            overrides[name] = value
    return paths, overrides, problems


def read_file(path: str, problems: list[str]) -> Layer:
    """Read one YAML file; what is wrong with it is added to the problems and the layer is empty."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        problems.append(
            f"--config {path}: cannot be read ({error.strerror or error}); give the path of a YAML file"
        )
        return Layer(path, {})
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        problems.append(f"--config {path}: is not YAML: {' '.join(str(error).split())}")
        return Layer(path, {})
    if not isinstance(content, dict):
        problems.append(f"--config {path}: expected sections such as `train:` with settings under them")
        return Layer(path, {})
    values = {}
    for section, settings in content.items():
        if isinstance(settings, dict):
            values |= {f"{section}.{name}": value for name, value in settings.items()}
        else:
            values[str(section)] = settings
    return Layer(path, values)


def fill_in(values: dict[str, Any], known: Mapping[str, Option], problems: list[str]) -> dict[str, Any]:
    """Fill in `${train.seed}` and `${oc.env:HOME}` by OmegaConf's rules."""
    defaults = {name: option.default for name, option in known.items() if not option.required}
    tree: dict[str, dict[str, Any]] = {}
    for name, value in {**defaults, **values}.items():
        if name in known:
            section, setting = name.split(".")
            tree.setdefault(section, {})[setting] = value
    container = OmegaConf.create(tree)
    resolved = dict(values)
    for name, value in values.items():
        if isinstance(value, str) and "${" in value and name in known:
            try:
                resolved[name] = OmegaConf.select(container, name, throw_on_missing=True)
            except OmegaConfBaseException as error:
                del resolved[name]
                problems.append(f"{name}: '{value}' cannot be filled in: {str(error).splitlines()[0]}")
    return resolved
