"""The ``swaft`` program, one file a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from swaft.errors import ConfigError


def reading(read: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """What an option's word is read by: a function, and what was expected where it raises a ValueError."""

    def read_word(word: str) -> Any:
        try:
            return read(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} was found, expected {expected}") from None

    return read_word


def _count(word: str) -> int:
    if (number := int(word)) < 1:
        raise ValueError
    return number


COUNT = reading(_count, "a whole number of at least 1")


class CommandParser(argparse.ArgumentParser):
    """Reads the words of a command; what it does not understand is a ConfigError.

    Args:
        command: its name, for messages.
    """

    def __init__(self, command: str):
        super().__init__(add_help=False, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Refuse the words.

        Raises:
            ConfigError: with the command and the way to its help.
        """
        raise ConfigError(f"swaft {self.command}: {message}; swaft {self.command} --help lists the options")
