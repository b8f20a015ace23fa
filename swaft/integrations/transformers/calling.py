"""The Trainer that calls a callback: its callbacks, and the checkpoints that it writes and resumes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback

from swaft.errors import ConfigError

CallbackT = TypeVar("CallbackT", bound=TrainerCallback)


def calling_trainer() -> tuple[Any, Path | None]:
    """Find the Trainer whose loop calls a callback, and the folder that the loop resumes from, if any."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return frame.f_locals["self"], None if folder is None else Path(folder)
        frame = frame.f_back
    raise ConfigError(
        "a swaft callback was not called by a Trainer; pass it to Trainer(..., callbacks=[...])"
    )


def require_told_of_checkpoints(args: Any) -> None:
    """Refuse checkpoints that a Trainer writes without telling its callbacks, as on SIGTERM.

    Raises:
        ConfigError: as described.
    """
    if args.enable_jit_checkpoint:
        raise ConfigError(
            "enable_jit_checkpoint writes a checkpoint without telling callbacks, so it would lack what swaft "
            "saves and no run could resume from it; set enable_jit_checkpoint=False, and save_steps to lose little"
        )


def those_of_kind(trainer: Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """Return a Trainer's callbacks of one kind, in order."""
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, kind)]


def checkpoint_of(args: Any, state: Any) -> Path:
    """Return the folder of a Trainer's checkpoint for the current step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
