"""The greedy soup of Wortsman et al. 2022 (arXiv:2203.05482): a checkpoint stays in if it does no harm."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swaft.errors import ConfigError, StateError

FOLDER = "{folder}"


@dataclass(frozen=True)
class GreedyChoice:
    """What was chosen, and why."""

    chosen: list[int]
    """Numbers of the candidates, the best first."""
    score: float
    """Of the mean of the chosen."""
    alone: list[float]
    """Score of every candidate alone."""
    trials: list[tuple[int, float, bool]]
    """(candidate, score of the mean with it, whether it stayed), in the order in which they were tried."""


def choose_greedily(
    count: int, score: Callable[[Sequence[int]], float], *, higher_is_better: bool
) -> GreedyChoice:
    """Begin with the best candidate, and try the others from the best down; one stays if the score gets no worse.

    Args:
        count: of candidates, numbered from 0.
        score: of the uniform mean of some of them; of one alone, of itself. Asked 2 count - 1 times.
        higher_is_better: or lower.
    """
    sign = 1.0 if higher_is_better else -1.0
    alone = [score([each]) for each in range(count)]
    order = sorted(range(count), key=lambda each: -sign * alone[each])
    chosen, best, trials = order[:1], alone[order[0]], []
    for each in order[1:]:
        found = score([*chosen, each])
        stays = sign * found >= sign * best
        trials.append((each, found, stays))
        if stays:
            chosen, best = [*chosen, each], found
    return GreedyChoice(chosen, best, alone, trials)


def score_by_command(command: str, folder: Path) -> float:
    """Run a command for a folder, and read the number that is the last line it prints.

    Args:
        command: words as in a shell, though no shell runs it; `{folder}` stands for the folder.
        folder: to be scored.

    Raises:
        ConfigError: the command does not say {folder}.
        StateError: it fails, or prints no number.
    """
    words = [word.replace(FOLDER, str(folder)) for word in command_words(command)]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise StateError(f"--evaluate: {words[0]} could not be started: {error.strerror}") from error
    if done.returncode:
        raise StateError(f"--evaluate: {shlex.join(words)} ended with exit code {done.returncode}")
    lines = done.stdout.strip().splitlines()
    try:
        value = float(lines[-1])
    except (IndexError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        last = repr(lines[-1][:200]) if lines else "nothing"
        raise StateError(
            f"--evaluate: the last line that {shlex.join(words)} printed is {last}; expected a number"
        )
    return value


def command_words(command: str) -> list[str]:
    """Split a command into words, as a shell does.

    Raises:
        ConfigError: {folder} is not in it, so it does not say what it scores, or its quotes do not close.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--evaluate: {command!r}: {error}") from error
    if not any(FOLDER in word for word in words[1:]):
        raise ConfigError(
            f"--evaluate is {command!r}; expected a command with {FOLDER} in it, such as "
            "'python score.py {folder}'"
        )
    return words
