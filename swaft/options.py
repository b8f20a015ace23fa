'''Options declared once, as dataclass fields: the type says what is allowed, the string below what it is for.

    @dataclass(frozen=True)
    class EMA:
        decay: Annotated[float, Range(above=0, below=1)] | None = None
        """Share of the old mean that each event keeps."""
        every: Count = 1
        """Optimizer steps between two members."""

A type is int, float, bool, str, Literal, None, a collection, or a union of these. If int and float are both
allowed, whole numbers have the range of int, others that of float. Python arguments are checked against this
declaration (`require`), and the recipes' settings, with their checks and help, are generated from it.
'''

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from swaft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Finite numbers between bounds; ``low`` and ``high`` are inclusive, ``above`` and ``below`` exclusive."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf

    def __contains__(self, value: Any) -> bool:
        """Whether a number is allowed; NaN and infinities never are."""
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """What is allowed, to be appended to "a number": ", at least 0 and below 1"."""
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        told = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))
        return f", {told}" if told else ""


Count = Annotated[int, Range(low=1)]
WholeNumber = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]
ShareBelowOne = Annotated[float, Range(low=0, below=1)]
StepOrShare = Annotated[float, Range(low=0, high=1)] | WholeNumber
"""A point of a run: a float such as 0.5 is a share of it, an int such as 100 a step. So 1 is step 1 and 1.0 the
end."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """The values that a dataclass field may have."""

    kinds: dict[type, Range]
    """The types a value may have, except None, with the range for numbers."""
    choices: tuple[str, ...] = ()
    """The allowed texts; empty: any text, if str is among the types."""
    optional: bool = False
    """Whether None is allowed."""
    default: Any = MISSING
    """`dataclasses.MISSING` if a value is required."""

    @property
    def required(self) -> bool:
        """Whether a value is required."""
        return self.default is MISSING

    @classmethod
    def of(cls, hint: Any, default: Any = MISSING) -> Option:
        """Read a type, as returned by `typing.get_type_hints` with extras."""
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds, choices = dict[type, Range](), list[str]()
        for member in members:
            kind, *notes = get_args(member) if get_origin(member) is Annotated else (member,)
            if get_origin(kind) is Literal:
                choices += get_args(kind)
                kind = str
            bounds = next((each for each in notes if isinstance(each, Range)), Range())
            kinds[get_origin(kind) or kind] = bounds
        optional = kinds.pop(NoneType, None) is not None
        return cls(kinds=kinds, choices=tuple(dict.fromkeys(choices)), optional=optional, default=default)

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, to follow the option's name: "is 0, expected ..."; None if nothing."""
        if self._allows(value):
            return None
        near = suggestion(value, self.choices) if isinstance(value, str) else ""
        return f"is {value!r}, expected {self.expected}" + (f".{near}" if near else "")

    @property
    def expected(self) -> str:
        """What is allowed, in words, except None."""
        words = {int: "a whole number", float: "a fraction" if int in self.kinds else "a number"}
        words |= {str: f"one of {', '.join(self.choices)}" if self.choices else "text", bool: "true or false"}
        return " or ".join(f"{words.get(kind, kind.__name__)}{bounds}" for kind, bounds in self.kinds.items())

    def _allows(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, str):
            return value in self.choices if self.choices else str in self.kinds
        if isinstance(value, bool):
            return bool in self.kinds
        if isinstance(value, Integral) and int in self.kinds:
            return value in self.kinds[int]
        if isinstance(value, Real):
            return float in self.kinds and value in self.kinds[float]
        return isinstance(value, tuple(self.kinds))


@cache
def options_of(section: type) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    hints = get_type_hints(section, include_extras=True)
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(section)
        if each.init
    }
    return {name: Option.of(hints[name], default) for name, default in defaults.items()}


def check(options: Any) -> list[tuple[str, str]]:
    """Every option of a dataclass instance with an invalid value: its name, and "is 0, expected ..."."""
    declared = options_of(type(options)).items()
    return [(name, fault) for name, option in declared if (fault := option.fault(getattr(options, name)))]


def require(options: Any) -> None:
    """Refuse a dataclass instance with invalid values.

    Raises:
        ConfigError: lists all of them.
    """
    if found := check(options):
        raise ConfigError([f"{name} {fault}" for name, fault in found])


def value_faults(name: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a single value of a type such as `Count`: an empty list, or one message with its name."""
    fault = Option.of(hint).fault(value)
    return [] if fault is None else [f"{name} {fault}"]


def require_value(name: str, value: Any, hint: Any) -> None:
    """Refuse a single value that its type does not allow.

    Raises:
        ConfigError: starts with its name.
    """
    if faults := value_faults(name, value, hint):
        raise ConfigError(faults)


def docs_of(section: type) -> dict[str, str]:
    """The description of each option of a dataclass: the string after its field in the source, in one line."""
    texts: dict[str, str] = {}
    for kind in filter(is_dataclass, reversed(section.__mro__)):  # a subclass's own come last
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for field, doc in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
            ):
                texts[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
        texts |= vars(kind).get("borrowed_docs", {})
    return texts


def suggestion(word: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to this one, or an empty text."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
