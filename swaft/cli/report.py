r"""Writes one self-contained HTML page about a run, or about several side by side.

    swaft report runs/1
    swaft report runs/seed-1 runs/seed-2 runs/seed-3 --output seeds.html

A run is a recipe's run folder, or an output folder or checkpoint of transformers' Trainer (trainer_state.json). The
page holds the curves of training, last against averaged weights at every evaluation, what was chosen after
training, generated samples, and the settings. Runs that differ in nothing but the seed are compared as pairs.

  --output FILE   where to write; default: report.html in the run's folder, or here for several. It is replaced
  --json          print where it is as JSON

Exit code: 0; 1 where nothing was written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from swaft.cli import CommandParser
from swaft.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Write the page about the runs that these words name, print where it is, and return the exit code."""
    options = _parser().parse_args(list(words))
    try:
        from swaft.report.page import render
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"swaft report needs {error.name}, which is not installed; pip install 'swaft[report]'"
        ) from error
    from swaft.report.runs import read_run

    folders = [Path(word) for word in options.runs]
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    page = render([read_run(folder) for folder in folders])
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}") from error
    print(json.dumps({"report": str(output)}) if options.json else output)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("report")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser
