"""The ``swaft`` program: finds the command and hands it the rest of the line.

Every command is a module of this package with ``run(words) -> int``, imported when it is asked for, so that
``swaft --help`` waits for no library.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from importlib import import_module

from swaft.errors import SwaftError

COMMANDS = {
    "validate": "check a run before it starts: all problems at once, without a GPU",
    "plan": "predict memory and time of a run on every rank, for any number of them",
    "average": "average finished checkpoints to one Hugging Face folder, in bounded memory",
    "export": "write the averages that a run has saved as a Hugging Face folder",
    "env": "versions and machine, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with its words (default: the command line's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        from swaft.config.values import suggestion

        sys.stderr.write(
            f"error: swaft has no command '{name}'.{suggestion(name, tuple(COMMANDS))}\n{usage()}\n"
        )
        return 2
    command = import_module(f"swaft.cli.{name}")
    if rest and rest[0] in ("-h", "--help"):
        print(inspect.cleandoc(command.__doc__ or name))
        return 0
    try:
        return command.run(rest)
    except SwaftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def usage() -> str:
    """Return what ``swaft --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, help_text in COMMANDS.items()]
    return "\n".join(["usage: swaft COMMAND ...", "", *lines, "", "swaft COMMAND --help says more."])
