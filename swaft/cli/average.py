r"""Averages finished checkpoints to one Hugging Face folder, in bounded memory.

    swaft average runs/1/final runs/2/final runs/3/final --output soup
    swaft average runs/1 --last 5 --base FOLDER --trust-pickle --output soup
    swaft average a b --weights 0.2,0.8 --dtype bfloat16 --output soup
    swaft average a b c --evaluate 'python score.py {folder}' --higher-is-better --output soup

A checkpoint is a Hugging Face folder with safetensors, a LoRA adapter folder (the updates are averaged, not their
factors), a checkpoint of a swaft run under torch alone or DeepSpeed (its trained weights at that step; needs --base
and --trust-pickle), a DeepSpeed checkpoint of ZeRO 1 to 3, or a state of averages saved by a run.

  --output FOLDER         where to write; must be empty or not exist
  --weights W,W,...       a non-negative number for each checkpoint, in any scale; default: all count the same
  --last K                the last K checkpoints, by step, of the given run folder
  --evaluate COMMAND      greedy soup: the best checkpoint first, then each that does not make the score worse; the
                          command's last line is the score of {folder}
  --higher-is-better, --lower-is-better
                          direction of the score
  --dtype TYPE            float32 (default), bfloat16 or float16, rounded once; how far that moved the weights is
                          printed
  --max-shard-size SIZE   largest size of a weights file: 5GB (default), 500MB, 2GiB, ...; an adapter is one file
  --base FOLDER           Hugging Face folder of the same model, for what the checkpoints lack: configuration,
                          tokenizer, frozen weights
  --lora-rank R           rank of the new adapter; at the old rank times the number of checkpoints nothing is lost
  --rule NAME             which average, if a state holds several
  --trust-pickle          open files of DeepSpeed and of torch's engines, which can run any code that is in them
  --json                  print the result as JSON

Exit code: 0; 1 if nothing was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaft.cli import COUNT, CommandParser, reading
from swaft.errors import ConfigError
from swaft.sizes import parse_size
from swaft.soup import Soup, average, average_greedily, last_checkpoints, score_by_command
from swaft.soup.soup import SHARD_BYTES, GreedyChoice, command_words
from swaft.storage.tensor_file import WRITTEN


def run(words: Sequence[str]) -> int:
    """Average the given checkpoints, print the result, and return the exit code."""
    options = _parser().parse_args(list(words))
    paths = _paths(options)
    how: dict[str, Any] = {
        "dtype": options.dtype,
        "max_shard_bytes": options.max_shard_size,
        "base": options.base,
        "lora_rank": options.lora_rank,
        "rule": options.rule,
        "trust_pickle": options.trust_pickle,
    }
    if options.evaluate is None:
        soup, choice = average(paths, options.output, weights=options.weights, **how), None
    else:
        command_words(options.evaluate)
        soup, choice = average_greedily(
            paths,
            options.output,
            score=lambda folder: _score(options.evaluate, folder),
            higher_is_better=options.higher_is_better,
            **how,
        )
    print(json.dumps(as_dict(soup, choice, paths), indent=2) if options.json else table(soup, choice, paths))
    return 0


def as_dict(soup: Soup, choice: GreedyChoice | None, paths: Sequence[Path]) -> dict[str, Any]:
    """Return what was written as plain values."""
    if choice is None:
        return soup.as_dict()
    trials = [{"checkpoint": str(paths[i]), "score": score, "kept": kept} for i, score, kept in choice.trials]
    alone = {str(path): score for path, score in zip(paths, choice.alone, strict=True)}
    return soup.as_dict() | {"greedy": {"score": choice.score, "alone": alone, "trials": trials}}


def table(soup: Soup, choice: GreedyChoice | None, paths: Sequence[Path]) -> str:
    """Return what was written as lines."""
    rows = [("average", f"{share:.4g} of {path}") for path, share in soup.shares]
    if choice is not None:
        rows += [("alone", f"{score:.6g}  {path}") for path, score in zip(paths, choice.alone, strict=True)]
        rows += [
            ("tried", f"{score:.6g}  with {paths[i]}: {'kept' if kept else 'left out'}")
            for i, score, kept in choice.trials
        ]
        rows.append(("score", f"{choice.score:.6g}"))
    rows.append(("weights", f"{soup.elements:,} in {soup.tensors:,} tensors, {soup.dtype}"))
    name, worst = soup.worst_rounding
    rows.append(("rounding", f"{soup.rounding:.2e} of the weights' norm, at most {worst:.2e} ({name})"))
    if soup.truncation is not None:
        rows.append(
            ("rank", f"off by {soup.truncation:.2e} of the mean update, for lack of rank (--lora-rank)")
        )
    rows += [("note", note) for note in soup.notes]
    size = sum(record.bytes for record in soup.files.values())
    rows.append(("written", f"{soup.output}: {size:,} bytes in {len(soup.files)} file(s), read back"))
    rows.append(("sha256", soup.sha256))
    return "\n".join(f"{part:<10} {line}" for part, line in rows)


def _score(command: str, folder: Path) -> float:
    value = score_by_command(command, folder)
    sys.stderr.write(f"{folder}: {value:.6g}\n")
    return value


def _paths(options: argparse.Namespace) -> list[Path]:
    """Return the checkpoints to average; refuse options that contradict each other."""
    if options.evaluate is not None and options.weights is not None:
        raise ConfigError("swaft average: --evaluate chooses by uniform means; expected it without --weights")
    if (options.evaluate is None) != (options.higher_is_better is None):
        raise ConfigError(
            "swaft average: --evaluate goes with --higher-is-better or --lower-is-better; expected both or neither"
        )
    if options.last is None:
        return [Path(each) for each in options.checkpoints]
    if len(options.checkpoints) != 1:
        raise ConfigError(f"swaft average: --last takes one run folder; found {len(options.checkpoints)}")
    return last_checkpoints(Path(options.checkpoints[0]), options.last)


def _parser() -> CommandParser:
    parser = CommandParser("average")
    parser.add_argument("checkpoints", nargs="+")
    add_output_options(parser)
    numbers = reading(lambda text: [float(word) for word in text.split(",")], "numbers separated by commas")
    parser.add_argument("--weights", type=numbers)
    parser.add_argument("--last", type=COUNT)
    parser.add_argument("--evaluate")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--higher-is-better", action="store_true", default=None)
    direction.add_argument("--lower-is-better", dest="higher_is_better", action="store_false", default=None)
    parser.add_argument("--lora-rank", type=COUNT)
    parser.add_argument("--trust-pickle", action="store_true")
    return parser


def add_output_options(parser: CommandParser) -> None:
    """Add the options for the output folder, and for what to take."""
    for name in ("base", "rule"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", choices=tuple(WRITTEN), default="float32")
    size = reading(parse_size, "a size such as 500MB")
    parser.add_argument("--max-shard-size", type=size, default=SHARD_BYTES)
    parser.add_argument("--json", action="store_true")
