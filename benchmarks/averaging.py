"""What weight averaging costs and how exact it is, next to other implementations, all in one run.

    python -m benchmarks.averaging                       # about 6 minutes on 2 quiet cores
    python -m benchmarks.averaging --section arithmetic  # one part again, put into the file of the last run
    python -m benchmarks.averaging --quick               # every path on tiny sizes; writes nothing without --out

Parts: ``arithmetic`` (rate of one update against ``a += b``), ``error`` (100,000 updates against float64),
``event`` (seconds, bytes and collectives of an averaging event, and the steps of training with it and without; on
a GPU its copy too) and ``memory``. Writes benchmarks/results/averaging.json, or averaging_<GPU>.json, and prints a
table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import (
    averaging_arithmetic,
    averaging_error,
    averaging_event,
    averaging_gpu,
    averaging_memory,
    command,
)

SECTIONS: dict[str, command.Section] = {
    "arithmetic": averaging_arithmetic,
    "error": averaging_error,
    "event": averaging_gpu if torch.cuda.is_available() else averaging_event,
    "memory": averaging_memory,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    command.run("averaging", SECTIONS, arguments, about=__doc__)


if __name__ == "__main__":
    main()
