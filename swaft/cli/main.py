"""The ``swaft`` program: finds the command and hands it the rest of the line.

Every command is a module of this package with ``run(words) -> int``, imported when it is used, so that
``swaft --help`` does not wait for libraries.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from swaft import __version__
from swaft.errors import ConfigError, SwaftError

COMMANDS = {
    "validate": "check a run before it starts: all problems at once, without a GPU",
    "plan": "predict memory and time of a run on every rank, for any number of ranks",
    "average": "average finished checkpoints into one Hugging Face folder, in bounded memory",
    "export": "write the averages saved by a run as a Hugging Face folder",
    "sweep": "run a recipe with several seeds and settings, and compare the runs",
    "report": "write one HTML page about a run, or about several side by side",
    "env": "versions and machine, for a bug report",
}

OF_RECIPES = ("accelerate", "datasets", "omegaconf", "tqdm", "transformers")
"""Packages of the extra ``recipes``; ``average`` and ``export`` do not need them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with its words (default: the command line's) and return its exit code.

    An error is a message on stderr, and with ``--json`` an object on stdout: its type as ``error`` and its
    messages as ``problems``.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Without this, Python would write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"swaft {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        from swaft.options import suggestion

        unknown = f"swaft has no command '{name}'.{suggestion(name, tuple(COMMANDS))}"
        _report(SwaftError(f"{unknown}\n{usage()}"), as_json="--json" in rest)
        return 2
    try:
        command = import_module(f"swaft.cli.{name}")
        if rest and rest[0] in ("-h", "--help"):
            print(inspect.cleandoc(command.__doc__ or name))
            return 0
        return command.run(rest)
    except SwaftError as error:
        _report(error, as_json="--json" in rest)
    except ModuleNotFoundError as error:
        if error.name not in OF_RECIPES:
            raise
        needed = f"swaft {name} needs {error.name}, which is not installed; pip install 'swaft[recipes]'"
        _report(SwaftError(needed), as_json="--json" in rest)
    return 1


def _report(error: SwaftError, *, as_json: bool) -> None:
    if as_json:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        print(json.dumps({"error": type(error).__name__, "problems": problems}, indent=2))
    else:
        sys.stderr.write(f"error: {error}\n")


def usage() -> str:
    """Return what ``swaft --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, help_text in COMMANDS.items()]
    more = "swaft COMMAND --help says more; swaft --version prints the version."
    return "\n".join(["usage: swaft COMMAND ...", "", *lines, "", more])
