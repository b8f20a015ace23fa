"""The ``swaft`` program, one file per command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from swaft.errors import ConfigError


def reading(read: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """Return an argparse type from a function, and from what was expected if it cannot read a word as a value."""

    def read_word(word: str) -> Any:
        try:
            return read(word)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{word!r} was found, expected {expected}") from None

    return read_word


def _count(word: str) -> int:
    if (number := int(word)) < 1:
        raise ValueError
    return number


COUNT = reading(_count, "a whole number of at least 1")


class CommandParser(argparse.ArgumentParser):
    """Parses the words of a command; words that it does not understand are a ConfigError."""

    def __init__(self, command: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ConfigError: with the command and how to get its help.
        """
        raise ConfigError(f"swaft {self.command}: {message}; swaft {self.command} --help lists the options")
