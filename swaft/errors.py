"""The errors swaft raises. Each message says what was found, what was expected, and which setting fixes it."""

from __future__ import annotations


def one_line(text: object) -> str:
    """Return a text, or the message of an error, without line breaks, as part of another text."""
    return " ".join(str(text).split())


def first_few(problems: list[str]) -> str:
    """Return the first three of many like problems in one line, and how many more there are."""
    more = f", and {len(problems) - 3} more like these" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}"


class SwaftError(Exception):
    """Base of every error that swaft raises on purpose."""


class ConfigError(SwaftError):
    """A configuration that cannot run. It lists every problem found, not only the first.

    Args:
        problems: one complete message per problem.
    """

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__("\n".join([f"{count}:", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """Pickle the problems, not the finished message, so that the error reaches other ranks intact."""
        return type(self), (self.problems,)


class DataError(SwaftError):
    """Data that does not fit the task: a wrong column, an empty split, a label out of range."""


class AveragingError(SwaftError):
    """Weight averaging cannot start, or was used in a way that would give wrong weights."""


class UnsupportedEngineError(AveragingError):
    """The fp32 master weights of a training engine, or of one of its modes, cannot be averaged faithfully."""


class LayoutError(AveragingError):
    """Master weights are not where the engine adapter expects them."""


class NoiseError(SwaftError):
    """Noise does not reach the network, or the model does not support it."""


class TrainingError(SwaftError):
    """Training cannot continue, for example because the loss is not finite."""


class StateError(SwaftError):
    """Saved state is damaged, incomplete, unsafe to open, or belongs to another run."""


class StateAccessError(StateError):
    """Saved state may be intact, but cannot be used now: access was refused, or it is from a newer swaft."""
