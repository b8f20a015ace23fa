"""Reads a configuration class: which settings it has, of what type, with which default and help text."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One setting of a configuration class."""

    path: str
    """Its full name, section and leaf: `train.learning_rate`."""
    types: tuple[type, ...]
    """The types its value may have, null apart."""
    choices: tuple[str, ...]
    """The values it may have; empty: any of the types."""
    optional: bool
    """Whether it may be null."""
    default: Any
    """Its default, or `dataclasses.MISSING` where it has to be given."""

    @property
    def required(self) -> bool:
        """Whether a value has to be given."""
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        """The type as help and messages write it: `float`, `int or float`, `a|b|c`."""
        names = ["|".join(self.choices)] if self.choices else [TYPE_NAMES[kind] for kind in self.types]
        return " or ".join(names + ["null"] * self.optional)


TYPE_NAMES = {bool: "true|false", int: "int", float: "float", str: "text", dict: "mapping"}


def sections(config_class: type) -> dict[str, type]:
    """List the sections of a configuration class: field name to the section's dataclass."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def leaves(config_class: type) -> dict[str, Leaf]:
    """All settings of a configuration class, in order, by full name."""
    found = {}
    for section, section_class in sections(config_class).items():
        hints = get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            path = f"{section}.{field.name}"
            found[path] = _leaf(path, hints[field.name], field.default)
    return found


def docs(section_class: type) -> dict[str, str]:
    """Return the help text of each field of a section: the string that follows the field in the source."""
    texts = {}
    for kind in reversed(section_class.__mro__):  # what a section adds or changes comes after its base's
        if dataclasses.is_dataclass(kind):
            texts |= _own_docs(kind)
    return texts


def _own_docs(section_class: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(section_class))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, follower in pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            texts[statement.target.id] = " ".join(str(follower.value.value).split())
    return texts


def _leaf(path: str, hint: Any, default: Any) -> Leaf:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [member for member in members if get_origin(member) is Literal]
    # A mapping is written dict[str, Any]: what it holds is for whoever reads the setting to check.
    plain = (str if member in literals else get_origin(member) or member for member in members)
    types = tuple(kind for kind in plain if kind is not NoneType)
    choices = tuple(value for literal in literals for value in get_args(literal))
    return Leaf(path=path, types=types, choices=choices, optional=NoneType in members, default=default)
