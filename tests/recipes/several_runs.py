"""Runs recipes one after the other in the same ranks: starting ranks takes longer than a small run.

    accelerate launch ... several_runs.py runs.json

The file holds a list of [recipe, launched, arguments], in which `launched` is a number format, or the environment
that a launch file of its own would make (ACCELERATE_..., FSDP_...). A run that fails ends the ranks with its
message.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from launching import forget_accelerate, load_recipe

from swaft.training.launch.failure import leave

# A run leaves the process group when it ends. Here the next one needs it, and DeepSpeed cannot make a second.
Accelerator.end_training = lambda self: None  # type: ignore[method-assign]


def main(runs: list[tuple[str, str | dict[str, str], list[str]]]) -> int:
    for recipe, launched, arguments in runs:
        if isinstance(launched, str):
            os.environ["ACCELERATE_MIXED_PRECISION"] = launched
        else:
            for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
                del os.environ[name]
            os.environ |= launched
        if code := load_recipe(recipe).main(arguments):
            sys.stderr.write(f"{recipe} {launched} {' '.join(arguments)} failed\n")
            return code
        forget_accelerate()
    return 0


if __name__ == "__main__":
    leave(main(json.loads(Path(sys.argv[1]).read_text())))
