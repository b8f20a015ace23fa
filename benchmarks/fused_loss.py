"""What the fused noise-stability loss costs and how exact it is, next to other ways to compute it, all in one run.

    python -m benchmarks.fused_loss                      # at most 6 minutes on 2 quiet cores, 4 on a GPU
    python -m benchmarks.fused_loss --section error      # one part again, put into the file of the last run
    python -m benchmarks.fused_loss --quick              # every path on tiny sizes; writes nothing without --out

Parts: ``speed`` (forward and backward by shape, next to the plain loss and the bare GEMMs; on a GPU also next to
Liger), ``memory`` (peaks), ``error`` (against float64, by size of noise), ``chunks`` (what chunk_bytes changes) and
``training_step`` (a T5 under R3F against a plain step). Writes benchmarks/results/fused_loss.json, or
fused_loss_<GPU>.json, and prints a table.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import (
    command,
    fused_loss_chunks,
    fused_loss_error,
    fused_loss_memory,
    fused_loss_rivals,
    fused_loss_speed,
    fused_loss_training_step,
)

SECTIONS: dict[str, command.Section] = {
    "speed": fused_loss_speed,
    "memory": fused_loss_memory,
    "error": fused_loss_error,
    "chunks": fused_loss_chunks,
    "training_step": fused_loss_training_step,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    command.run("fused_loss", SECTIONS, arguments, about=__doc__, head={"arms": fused_loss_rivals.ABOUT})


if __name__ == "__main__":
    main()
