"""Collects every problem of a run, where a plain chain of calls would stop at the first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from swaft.errors import ConfigError, SwaftError

if TYPE_CHECKING:
    from swaft.averaging.rules import Rule
    from swaft.training.evaluation.best import Target

WholeT = TypeVar("WholeT")


class MissingPart(AttributeError):
    """A part that could not be made; its problem is on the list."""


class Parts:
    """Attributes that are filled one after the other; reading one that is missing raises `MissingPart`."""

    def __getattr__(self, name: str) -> Any:
        raise MissingPart(name)


def without(whole: WholeT, names: Collection[str]) -> WholeT:
    """Return an object like another one, of its class, whose attributes of these names are missing parts."""
    kind = type(whole)
    some: Any = object.__new__(type(kind.__name__, (Parts, kind), {}))
    vars(some).update({name: value for name, value in vars(whole).items() if name not in names})
    return some


class Prepared(Parts):
    """What every recipe's `prepare` finds; a part is missing where its problem is on the list."""

    rows: Mapping[str, Any]
    """Rows by split, `train` among them."""
    metric: Any
    """What scores predictions; None: nothing but the loss does."""
    model_config: Any
    """Configuration of the model, as transformers has it."""
    tokenizer: Any
    """The one that reads the rows; None: a new one is to be trained."""
    objective: Any
    """Training objective, such as `swaft.R3F`."""
    rule: Rule | None
    """Averaging rule; None: nothing is averaged."""
    target: Target
    """What decides between weights."""
    cuts_rows: bool = False
    """Whether long rows are cut into several, so that there may be more to train on than rows."""


class Problems:
    """The problems of one run, in the order in which they were found.

        problems, ready = Problems(), Parts()
        with problems:
            ready.rows = load_splits(config.data)
        with problems:
            ready.task = describe_task(ready.rows, config.data)   # left out where there are no rows
        problems.refuse()

    An error of `swaft.errors` ends its block and is put on the list; so does a part that is missing, silently.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def __enter__(self) -> None:
        """Begin a part of the work."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End it, with its problem on the list if it has one."""
        if isinstance(error, SwaftError):
            self.add(error.problems if isinstance(error, ConfigError) else [str(error)])
        return isinstance(error, SwaftError | MissingPart)

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
