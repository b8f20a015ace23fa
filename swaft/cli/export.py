r"""Writes the averages saved by a run as a Hugging Face folder, on one machine, whatever engine saved them.

    swaft export runs/1 --dtype bfloat16 --output averaged
    swaft export runs/1/checkpoint-500 --base runs/1/best --output averaged

The source is a run folder, a checkpoint of a run or of transformers' Trainer, or a state that `averager.save_state`
wrote. From a finished run the final average is taken, from an unfinished one the average in its newest complete
checkpoint; the step is printed. Every byte of a state is checked first, and for a checkpoint of a run also that the
averages are its own; the folder is read back before it gets its name.

  --base FOLDER           Hugging Face folder of the same model, for configuration, tokenizer and frozen weights;
                          for a LoRA run its adapter folder, then an adapter folder is written. Not needed for a
                          finished run or a checkpoint of the Trainer, which have all that themselves
  --output FOLDER         where to write; must be empty or not exist
  --rule NAME             which average, if a state holds several
  --dtype TYPE            float32 (default), bfloat16 or float16, rounded once; how far that moved the weights is
                          printed
  --max-shard-size SIZE   largest size of a weights file: 5GB (default), 500MB, 2GiB, ...; an adapter is one file
  --json                  print the result as JSON

Exit code: 0; 1 if nothing was written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from swaft.averaging.state import KIND, AverageState
from swaft.cli import CommandParser
from swaft.cli.average import add_output_options, table
from swaft.errors import ConfigError
from swaft.soup import average
from swaft.soup.huggingface import ADAPTER_CONFIG, CONFIG, holds_weights, read_json
from swaft.soup.kinds import AVERAGES, ENGINE
from swaft.storage import read_manifest
from swaft.storage.files import status
from swaft.storage.sealed import MANIFEST, find_checkpoints

FINAL_AVERAGED, SUMMARY = "final-averaged", "summary.json"
"""What a run writes at its end: a Hugging Face folder of its average, and last of all its scores."""
OF_TRAINER = "averages"
"""Folder of averages in a checkpoint of transformers' Trainer, or of accelerate."""


def run(words: Sequence[str]) -> int:
    """Export the given average, print the result, and return the exit code."""
    parser = CommandParser("export")
    parser.add_argument("average")
    add_output_options(parser)
    options = parser.parse_args(list(words))
    named = Path(options.average)
    is_final = ended_with_average(named)
    source = named / FINAL_AVERAGED if is_final else saved_averages(Path(os.path.realpath(named)))
    if is_final and options.rule is not None:
        parser.error(
            f"--rule {options.rule}: {source} is the one average of a finished run; leave --rule out"
        )
    base, checkpoint = options.base, source.parent
    # accelerate's checkpoints may hold weights too, but nothing that says of which model.
    says_which = any(status(checkpoint / name) is not None for name in (CONFIG, ADAPTER_CONFIG))
    if base is None and source.name == OF_TRAINER and says_which and holds_weights(checkpoint):
        base = str(checkpoint)
    if not is_final and base is None:
        parser.error(
            f"--base is missing: {source} holds only weights; give a Hugging Face folder of the same model, from "
            "which configuration, tokenizer and frozen weights come"
        )
    soup = average(
        [source],
        options.output,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_size,
        base=base,
        rule=options.rule,
    )
    if is_final:
        steps = read_json(named / SUMMARY)["applied_steps"]
    else:
        steps = AverageState.from_json(read_manifest(source, kind=KIND).content, where=source).applied_steps
    if options.json:
        print(json.dumps(soup.as_dict() | {"applied_steps": steps}, indent=2))
    else:
        print(f"{'taken':<10} after optimizer step {steps:,}{', the end of the run' if is_final else ''}")
        print(table(soup, None, [source]))
    return 0


def ended_with_average(path: Path) -> bool:
    """Whether a folder belongs to a finished run and holds its final average.

    Raises:
        StateError: the folder cannot be read.
    """
    return status(path / SUMMARY) is not None and holds_weights(path / FINAL_AVERAGED)


def saved_averages(path: Path) -> Path:
    """Return the folder of averages that a path refers to.

    Args:
        path: such a folder, a checkpoint of a run or of the Trainer, or a run folder.

    Raises:
        ConfigError: there are no averages there.
        StateError: the folder cannot be read.
    """
    newest = find_checkpoints(path)[:1]
    for folder in (*(each / AVERAGES for each in (*newest, path)), path / OF_TRAINER):
        if status(folder / MANIFEST) is not None:
            return folder
    if status(path / MANIFEST) is not None and status(path / ENGINE) is None:
        return path
    raise ConfigError(
        f"swaft export: {path} holds no averages; expected a state that averager.save_state wrote, a checkpoint "
        "with averages of a run or of transformers' Trainer, or a recipe's run folder"
    )
