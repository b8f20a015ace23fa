"""Weights and optimizer state of a training engine on disk: DeepSpeed's own files under it, torch's else.

A rank that cannot write would leave the others waiting inside DeepSpeed, which is guarded against here. Plain, DDP
and FSDP2 runs leave torch's distributed checkpoints, which any of the three opens, at any number of ranks; files of
DeepSpeed belong to one stage and one number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from swaft.errors import StateError

TAG = "engine"
"""Name of the folder that DeepSpeed writes its files to."""


def zero_stage(model: Any) -> int | None:
    """DeepSpeed's stage of ZeRO of a model as prepared; None under another engine."""
    stage = getattr(model, "zero_optimization_stage", None)
    return stage() if stage is not None and hasattr(model, "load_checkpoint") else None


def save_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path, *, stepped: bool) -> None:
    """Write weights and optimizer state into a folder that is there (collective).

    Frozen weights are left out: a resumed run has loaded them as it did the first time.

    Args:
        model: as prepared.
        module: the same, unwrapped.
        optimizer: torch's own, unwrapped.
        folder: of the checkpoint.
        stepped: whether the optimizer has taken a step. Without one torch has no state, and would make some.

    Raises:
        Exception: whatever torch or DeepSpeed raise where this rank, or under torch any, could not write.
    """
    with _one_fault():
        if zero_stage(model) is not None:
            _save_deepspeed(model, folder)
            return
        save(_state_dict(module, optimizer if stepped else None), checkpoint_id=folder / TAG)


def load_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path, *, stepped: bool) -> None:
    """Put the state that :func:`save_engine` wrote, with the same arguments, into model and optimizer (collective).

    Raises:
        StateError: DeepSpeed found no state.
        Exception: whatever torch or DeepSpeed raise for a state that does not fit the model.
    """
    with _one_fault():
        if zero_stage(model) is not None:
            path, _ = model.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
            if path is None:
                raise StateError(f"DeepSpeed found no state in {folder}")
            return
        state = _state_dict(module, optimizer if stepped else None)
        load(state, checkpoint_id=folder / TAG)
        set_model_state_dict(module, state["model"], options=_OPTIONS)
        if stepped:
            set_optimizer_state_dict(module, optimizer, state["optimizer"], options=_OPTIONS)


def _save_deepspeed(model: Any, folder: Path) -> None:
    """Have DeepSpeed write its files, and raise after the last of its barriers what went wrong before.

    A rank that raised inside would leave the others waiting there. For the same reason rank 0 writes nothing alone:
    neither the file `latest`, which a sealed folder does not need, nor the copies of DeepSpeed's scripts, which
    `python -m deepspeed.utils.zero_to_fp32 ... --tag engine` has.
    """
    writer = model.checkpoint_engine
    noting = model.checkpoint_engine = _NotingWriter(writer)
    model._copy_recovery_script = lambda path: None
    try:
        model.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        model.checkpoint_engine = writer
        del model._copy_recovery_script
    if noting.error is not None:
        raise noting.error


class _NotingWriter:
    """DeepSpeed's writer of files, but that it keeps its errors to itself."""

    def __init__(self, writer: Any):
        self.error: Exception | None = None
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def makedirs(self, *arguments: Any, **options: Any) -> None:
        self._note(self._writer.makedirs, *arguments, **options)

    def save(self, *arguments: Any, **options: Any) -> None:
        self._note(self._writer.save, *arguments, **options)

    def _note(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except Exception as error:  # a full disk, say, which torch's writer makes a RuntimeError
            self.error = self.error or error


_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def _state_dict(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"model": get_model_state_dict(module, options=_OPTIONS)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
    return state


@contextmanager
def _one_fault() -> Iterator[None]:
    """Raise the first rank's fault itself, where torch raises, on all ranks, a traceback of each.

    That one process saves alone, which torch warns of each time, is what was meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()), (error,))[0] from error
