"""The Trainer that calls a callback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import Trainer

from swaft.errors import ConfigError


def calling_trainer() -> tuple[Any, Path | None]:
    """Find the Trainer whose loop calls a callback, and the folder that the loop resumes from, where it does."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return frame.f_locals["self"], None if folder is None else Path(folder)
        frame = frame.f_back
    raise ConfigError(
        "a callback of swaft was called by no Trainer; pass it to Trainer(..., callbacks=[...])"
    )


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the callbacks of a Trainer, in the order in which they are called; a list that may be changed."""
    return trainer.callback_handler.callbacks
