"""The errors swaft raises. Each message says what was found, what was expected, and which setting mends it."""

from __future__ import annotations


class SwaftError(Exception):
    """Base of every error that swaft raises on purpose."""


class ConfigError(SwaftError):
    """A configuration that cannot run. Carries every problem found, not only the first.

    Args:
        problems: one complete message a problem.
    """

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__("\n".join([f"{count} with this run:", *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """Survive the way to another rank: the problems, not the finished message."""
        return type(self), (self.problems,)


class DataError(SwaftError):
    """Data that does not fit the task: a wrong column, an empty split, a label out of range."""


class AveragingError(SwaftError):
    """Weight averaging that cannot start, or was used in a way that would give wrong weights."""


class UnsupportedEngineError(AveragingError):
    """A training engine, or a mode of one, whose fp32 master weights cannot be averaged faithfully."""


class LayoutError(AveragingError):
    """Master weights that are not where the engine adapter expects them."""


class NoiseError(SwaftError):
    """Noise that does not reach the network, or a model it cannot be given to."""


class TrainingError(SwaftError):
    """Training that cannot continue: a loss that is not finite, say."""


class StateError(SwaftError):
    """Saved state that is damaged, incomplete, unsafe to open, or of another run."""


class StateAccessError(StateError):
    """State that may be sound, but cannot be opened or written now: refused by the system, or of a newer swaft."""
