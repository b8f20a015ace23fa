"""Weights and optimizer state of a training engine on disk: DeepSpeed's own files under it, torch's else.

Plain, DDP and FSDP2 runs leave torch's distributed checkpoints, which any of the three opens, at any number of
ranks. DeepSpeed's files belong to one stage and one number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from swaft.errors import StateError

TAG = "engine"
"""Name of the folder that DeepSpeed writes its files to."""


def is_deepspeed(model: nn.Module) -> bool:
    """Whether a model, as prepared, is DeepSpeed's engine."""
    return hasattr(model, "load_checkpoint") and hasattr(model, "zero_optimization_stage")


def save_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write weights and optimizer state into a folder that is there (collective).

    Frozen weights are left out: a run that goes on has loaded them as it did the first time.

    Args:
        model: as prepared.
        module: the same, unwrapped.
        optimizer: torch's own, unwrapped.
        folder: of the checkpoint.

    Raises:
        StateError: this rank could not write.
    """
    with _explained(folder, "written"):
        if is_deepspeed(model):
            model.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
            return
        save(_state_dict(module, optimizer), checkpoint_id=folder / TAG)


def load_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Put the state that :func:`save_engine` wrote into model and optimizer (collective).

    Args:
        model: as prepared, and so on.
        module: the same, unwrapped.
        optimizer: torch's own, unwrapped.
        folder: of the checkpoint; its files have been checked.

    Raises:
        StateError: the state does not fit the model.
    """
    with _explained(folder, "loaded"):
        if is_deepspeed(model):
            path, _ = model.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
            if path is None:
                raise StateError(f"DeepSpeed found no state in {folder}")
            return
        state = _state_dict(module, optimizer)
        load(state, checkpoint_id=folder / TAG)
        set_state_dict(
            module,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )


_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def _state_dict(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(module, optimizer, options=_OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state}


@contextmanager
def _explained(folder: Path, done: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise StateError(
            f"{folder / TAG}: the engine's state could not be {done}: {type(error).__name__}: {error}"
        ) from error
