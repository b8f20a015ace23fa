r"""Writes the averages that a run has saved as a Hugging Face folder, on one machine, whatever engine saved them.

    swaft export runs/1/checkpoint-500 --base bert-base --output averaged
    swaft export runs/1 --base runs/1/best --dtype bfloat16 --output averaged

What is named is a state that `averager.save_state` wrote, a checkpoint of a run, or a run folder, of which the
newest complete checkpoint is taken. Every byte is checked first, and in a checkpoint also that the averages are its
own; the folder is read back before it gets its name.

  --base FOLDER           Hugging Face folder of the same model, for configuration, tokenizer and frozen weights; of
                          a LoRA run its adapter folder, then an adapter folder is written
  --output FOLDER         where to write; it must not hold anything
  --rule NAME             which average of a state that holds several
  --dtype TYPE            float32 (default), bfloat16 or float16, rounded once, and how far that moved the weights
  --max-shard-size SIZE   of a file of weights: 5GB (default), 500MB, 2GiB, ...
  --json                  print the result as JSON

Exit code: 0; 1 where nothing was written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from swaft.cli.average import table
from swaft.errors import ConfigError
from swaft.soup import average
from swaft.soup.output import parse_size
from swaft.soup.soup import DTYPES
from swaft.storage.files import explained, status
from swaft.storage.sealed import MANIFEST
from swaft.training.run.checkpoints import AVERAGE, find_checkpoints
from swaft.training.run.engine_state import TAG


def run(words: Sequence[str]) -> int:
    """Export the state that these words name, print what came of it, and return the exit code."""
    options = _parser().parse_args(list(words))
    state = saved_averages(Path(options.state))
    soup = average(
        [state],
        options.output,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        base=options.base,
        rule=options.rule,
    )
    print(json.dumps(soup.as_dict(), indent=2) if options.json else table(soup, None, [state]))
    return 0


def saved_averages(path: Path) -> Path:
    """The folder of averages that a path means.

    Args:
        path: such a folder, a checkpoint of a run, or a run folder.

    Raises:
        ConfigError: there are no averages there.
        StateError: the folder cannot be looked into.
    """
    with explained(path, "looked at"):
        newest = find_checkpoints(path)[:1]
    for folder in (*newest, path):
        if status(folder / AVERAGE / MANIFEST) is not None:
            return folder / AVERAGE
    if status(path / MANIFEST) is not None and status(path / TAG) is None:
        return path
    raise ConfigError(
        f"swaft export: {path} holds no averages; expected a state that averager.save_state wrote, a checkpoint of "
        "a run with averaging, or its run folder"
    )


def _parser() -> argparse.ArgumentParser:
    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"swaft export: {message}; swaft export --help lists the options")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("state")
    parser.add_argument("--base", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rule")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--max-shard-size", type=parse_size, default=parse_size("5GB"))
    parser.add_argument("--json", action="store_true")
    return parser
