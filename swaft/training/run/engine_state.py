"""Weights and optimizer state of a run, written and read by its engine.

Plain, DDP and FSDP2 runs write torch's distributed checkpoints, which any of the three opens, on any number of
ranks; DeepSpeed's files are tied to one stage and one number of ranks. A rank that fails alone inside the engine
does not leave the others waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
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
from swaft.training.run.checkpoints import TAG

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def zero_stage(model: Any) -> int | None:
    """Return DeepSpeed's ZeRO stage of a prepared model; None under another engine."""
    return model.zero_optimization_stage() if hasattr(model, "load_checkpoint") else None


def save_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write weights and optimizer state into an existing folder (collective).

    Frozen weights are left out: a resumed run loads them as it did the first time.

    Args:
        model: the prepared model.
        module: the same, unwrapped.
        optimizer: torch's own, unwrapped.
        folder: folder of the checkpoint.

    Raises:
        Exception: whatever torch or DeepSpeed raise if this rank (under torch, any rank) could not write.
    """
    if zero_stage(model) is not None:
        _save_deepspeed(model, folder)
        return
    with _first_fault():
        # If there is no state, torch would take a step to create it, and the state would count it.
        save(_state_dict(module, optimizer if optimizer.state else None), checkpoint_id=folder / TAG)


def load_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Load what :func:`save_engine` wrote, with the same arguments, into model and optimizer (collective).

    Raises:
        StateError: DeepSpeed found no state.
        Exception: whatever torch or DeepSpeed raise for a state that does not fit the model.
    """
    if zero_stage(model) is not None:
        path, _ = model.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise StateError(f"DeepSpeed found no state in {folder}")
        return
    with _first_fault():
        names = FileSystemReader(folder / TAG).read_metadata().state_dict_metadata
        state = _state_dict(
            module, optimizer if any(name.startswith("optimizer.") for name in names) else None
        )
        load(state, checkpoint_id=folder / TAG)
        set_model_state_dict(module, state["model"], options=_OPTIONS)
        if "optimizer" in state:
            set_optimizer_state_dict(module, optimizer, state["optimizer"], options=_OPTIONS)


def _save_deepspeed(model: Any, folder: Path) -> None:
    """Make DeepSpeed write its files, and raise errors only after the last of its barriers.

    A rank that raised earlier would leave the others waiting there. For the same reason rank 0 writes nothing
    alone: neither the file `latest`, which a sealed folder does not need, nor the copy of DeepSpeed's script, which
    can be run as `python -m deepspeed.utils.zero_to_fp32 ... --tag engine`.
    """
    errors: list[Exception] = []

    def noting(call: Callable[..., Any]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            try:
                call(*arguments, **options)
            except Exception as error:  # such as a full disk, which torch's writer turns into a RuntimeError
                errors.append(error)

        return noted

    writer = model.checkpoint_engine
    writer.makedirs, writer.save = noting(writer.makedirs), noting(writer.save)
    model._copy_recovery_script = lambda path: None
    try:
        model.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    finally:
        del writer.makedirs, writer.save, model._copy_recovery_script
    if errors:
        raise errors[0]


def _state_dict(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"model": get_model_state_dict(module, options=_OPTIONS)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(module, optimizer, options=_OPTIONS)
    return state


@contextmanager
def _first_fault() -> Iterator[None]:
    """Raise only the first rank's error, where torch would raise every rank's traceback on all ranks.

    Silence torch's warning that one process saves alone, which is intended.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()), (error,))[0] from error
