"""The ``swaft`` program, one file a command."""

from __future__ import annotations

import argparse
from typing import NoReturn

from swaft.errors import ConfigError


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
