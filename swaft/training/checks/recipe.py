"""What a recipe file offers besides training: its settings, and what can be told of a run beforehand.

A recipe is a script that defines ``Config``, the class of its settings, made of the sections of
`swaft.training.config`, and ``prepare(config, problems)``, which finds and checks everything that needs no device
and no other rank.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from swaft.errors import ConfigError
from swaft.training.checks.problems import Prepared, Problems

OFFERED = {"Config", "prepare"}


@dataclass(frozen=True)
class Recipe:
    """The two things that a recipe file defines for others."""

    config_class: type
    """A dataclass of section dataclasses, such as `ClassificationConfig`."""
    prepare: Callable[[Any, Problems], Prepared]
    """Finds and checks what needs no device and no other rank."""


def is_recipe(path: Path) -> bool:
    """Whether a script is a recipe, as far as can be seen without running it.

    Others may define the same two names; a recipe also takes its settings from `swaft.training.config`.

    Args:
        path: of a file. One that is no Python is no recipe.
    """
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    imported = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    return names >= OFFERED and any(str(name).startswith("swaft.training.config") for name in imported)


def require_python(path: Path) -> None:
    """Refuse a script that no run could read, whoever wrote it.

    Args:
        path: of a file.

    Raises:
        ConfigError: with the line where it ceases to be Python.
    """
    try:
        ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ConfigError(
            f"{path}: line {error.lineno} is not Python: {error.msg}; mend that line"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; expected a Python file") from error


def load_recipe(path: Path) -> Recipe:
    """Import a recipe file (which starts nothing).

    Args:
        path: of a file for which `is_recipe` is true.

    Raises:
        ConfigError: where it cannot be imported.
    """
    name = f"swaft_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: cannot be imported; expected a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script that is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not (isinstance(module.Config, type) and is_dataclass(module.Config)):
        raise ConfigError(f"{path}: Config is no dataclass of sections such as TrainConfig")
    return Recipe(config_class=module.Config, prepare=module.prepare)
