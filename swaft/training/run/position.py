"""How far a run has come: what its training loop moves and a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Position:
    """How far a run has come, between two optimizer steps."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    epoch: int = 0
    """Passes over the training rows before this one."""
    batches: int = 0
    """Micro-batches of this pass that each rank has trained on."""
    evaluated: bool = True
    """Whether the evaluation that was due after the step has been made."""
    stopped: bool = False
    """Whether an evaluation has ended the run."""
