"""Weights and optimizer state on disk: a rank that fails alone must not leave the others waiting in the engine.

Plain, DDP and FSDP2 runs leave torch's distributed checkpoints, which any of the three opens, at any number of
ranks; files of DeepSpeed belong to one stage and one number of ranks. What DDP has to know of a model, so that a
resumed run sums its gradients in the same order, is here as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
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
from torch.nn.parallel import DistributedDataParallel

from swaft.errors import StateError

TAG = "engine"
"""Name of the folder that holds the engine's files."""
LEAVE_WEIGHTS_UNUSED = frozenset(
    {
        *("axk2", "big_bird", "canine", "encoder-decoder", "esm", "fnet", "layoutlmv3", "led", "lilt"),
        *("luke", "markuplm", "mra", "squeezebert", "t5gemma2", "xlnet"),
    }
)
"""Types with trained weights that rows of text give no gradient in some task: poolers, attention that is global."""
OTHER_PARTS = ("vision_config", "audio_config", "auto_map")
"""Entries of a configuration with a part that text does not go through, or with code that may have one."""
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def zero_stage(model: Any) -> int | None:
    """DeepSpeed's stage of ZeRO of a model as prepared; None under another engine."""
    return model.zero_optimization_stage() if hasattr(model, "load_checkpoint") else None


def save_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write weights and optimizer state into a folder that is there (collective).

    Frozen weights are left out: a resumed run has loaded them as it did the first time.

    Args:
        model: as prepared.
        module: the same, unwrapped.
        optimizer: torch's own, unwrapped.
        folder: of the checkpoint.

    Raises:
        Exception: whatever torch or DeepSpeed raise where this rank, or under torch any, could not write.
    """
    if zero_stage(model) is not None:
        _save_deepspeed(model, folder)
        return
    with _first_fault():
        # Where there is no state, torch would take a step for it, which everybody counts who counts steps.
        save(_state_dict(module, optimizer if optimizer.state else None), checkpoint_id=folder / TAG)


def load_engine(model: Any, module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Put the state that :func:`save_engine` wrote, with the same arguments, into model and optimizer (collective).

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


def allow_unused_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Have DDP look for weights without a gradient, which it would wait for, where a model's type has some.

    Args:
        accelerator: nothing prepared yet; other engines than DDP take such weights as they are.
        model: a transformers model, or adapters on one.
    """
    config: Any = getattr(model, "config", None)
    unused = getattr(config, "model_type", None) in LEAVE_WEIGHTS_UNUSED
    if unused or any(getattr(config, name, None) for name in OTHER_PARTS):
        handler: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = handler


def settle_buckets(accelerator: Accelerator, model: nn.Module, objective: Any, batch: dict[str, Any]) -> None:
    """Take one backward pass for the sake of the order in which gradients arrive (collective under DDP).

    After its first backward pass DDP puts gradients into other buckets, by the order in which they arrived. Of
    three ranks and more, the rounding of a sum depends on where in its bucket an element lies; so a process that
    resumes would take its first step with other last bits than the run it continues. Gradients are dropped
    again; what else a pass moves (generators, buffers, the objective's count) has to be restored afterwards.

    Args:
        accelerator: that prepared the model.
        model: as prepared; anything but DDP is left alone.
        objective: loss of a micro-batch.
        batch: inputs of the model, of any rows, on the host.
    """
    if isinstance(model, DistributedDataParallel):
        model.train()
        accelerator.backward(objective(model, send_to_device(batch, accelerator.device)).loss)
        model.zero_grad()


def _save_deepspeed(model: Any, folder: Path) -> None:
    """Have DeepSpeed write its files, and raise after the last of its barriers what went wrong before.

    A rank that raised inside would leave the others waiting there. For the same reason rank 0 writes nothing alone:
    neither the file `latest`, which a sealed folder does not need, nor the copies of DeepSpeed's scripts, which
    `python -m deepspeed.utils.zero_to_fp32 ... --tag engine` has.
    """
    errors: list[Exception] = []

    def noting(call: Callable[..., Any]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            try:
                call(*arguments, **options)
            except Exception as error:  # a full disk, say, which torch's writer makes a RuntimeError
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
    """Raise the first rank's fault itself, where torch raises, on all ranks, a traceback of each.

    That one process saves alone, which torch warns of each time, is what was meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()), (error,))[0] from error
