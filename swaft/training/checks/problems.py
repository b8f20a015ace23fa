"""Collects every problem of a run, where a plain chain of calls would stop at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from swaft.errors import ConfigError, SwaftError

P = ParamSpec("P")
T = TypeVar("T")


class _Missing:
    """Stands for what could not be made; all that could be read from it is missing as well."""

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):  # a protocol of Python's that this does not follow
            raise AttributeError(name)
        return self

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()
"""What `Problems.of` returns where it has no result: its problem is on the list already."""


class Problems:
    """The problems of one run, in the order in which they were found.

    problems = Problems()
    rows = problems.of(load_splits, config.data)
    task = problems.of(describe_task, rows, config.data)   # not called where there are no rows
    problems.refuse()
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function with these arguments.

        Returns:
            Its result; `MISSING` where it raised an error of `swaft.errors`, which is on the list then, or was not
            called because an argument is missing.
        """
        if any(value is MISSING for value in (*args, *kwargs.values())):
            return MISSING
        try:
            return function(*args, **kwargs)
        except SwaftError as error:
            self.add(error.problems if isinstance(error, ConfigError) else [str(error)])
            return MISSING

    def add(self, problems: Iterable[str]) -> None:
        """Put problems on the list, each once."""
        self.found += [problem for problem in dict.fromkeys(problems) if problem not in self.found]

    def refuse(self) -> None:
        """Raise where there are problems.

        Raises:
            ConfigError: with all of them.
        """
        if self.found:
            raise ConfigError(self.found)
