r"""Writes one self-contained HTML page about a run, or about several side by side.

    swaft report runs/1
    swaft report runs/seed-1 runs/seed-2 runs/seed-3 --output seeds.html

A run is a recipe's run folder, or an output folder, checkpoint or trainer_state.json of transformers' Trainer. The
page shows the training curves, last against averaged weights at every evaluation, what was chosen after
training, generated samples, and the settings. Runs that differ only in the seed are compared as pairs.

  --surface       first compute, for every run, the loss along the line from the last weights through the averaged
                  ones and beyond, and over a plane with a random direction of the same length in every tensor; on
                  validation rows, in fp32, on a GPU if there is one. It is written to surface.json in the run's
                  folder, replacing an earlier one, and drawn from then on. For finished runs of a recipe; start it
                  where the run was started if its data files have relative paths. In a Trainer's
                  script, swaft.integrations.transformers.write_surface(trainer) does the same
  --rows N        how many validation rows --surface uses, from the first on; default: 256
  --output FILE   where to write; default: report.html in the run's folder, or here for several runs. An existing
                  file is replaced
  --json          print the path of the page as JSON

Exit code: 0; 1 if nothing was written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from swaft.cli import COUNT, CommandParser
from swaft.errors import ConfigError

SURFACE_ROWS = 256
"""How many validation rows a surface uses by default."""


def run(words: Sequence[str]) -> int:
    """Write the page about the given runs, print its path, and return the exit code."""
    options = _parser().parse_args(list(words))
    if options.rows is not None and not options.surface:
        raise ConfigError(
            f"--rows {options.rows} is for --surface, which is not given; add it, or remove --rows"
        )
    try:
        from swaft.report.page import render
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"swaft report needs {error.name}, which is not installed; pip install 'swaft[report]'"
        ) from error
    from swaft.report.runs import read_run

    runs = [read_run(Path(word)) for word in options.runs]
    folders = [each.path for each in runs]
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if options.surface:
        from swaft.report.surface import write_surface
        from swaft.training.run.progress import disable_progress_bars

        disable_progress_bars()
        for folder in folders:
            write_surface(folder, rows=options.rows or SURFACE_ROWS)
        runs = [read_run(folder) for folder in folders]
    page = render(runs)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}") from error
    print(json.dumps({"report": str(output)}) if options.json else output)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("report")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--surface", action="store_true")
    parser.add_argument("--rows", type=COUNT)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser
