"""What DDP has to know of a model, and the buckets in which it sums gradients, settled before a run resumes."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swaft.training.evaluation.evaluate import without_row_id

LEAVE_WEIGHTS_UNUSED = frozenset(
    {
        *("axk2", "big_bird", "canine", "encoder-decoder", "esm", "fnet", "layoutlmv3", "led", "lilt"),
        *("luke", "markuplm", "mra", "squeezebert", "t5gemma2", "xlnet"),
    }
)
"""Types with trained weights that rows of text give no gradient in some task: poolers, attention that is global."""
OTHER_PARTS = ("vision_config", "audio_config", "auto_map")
"""Entries of a configuration with a part that text does not go through, or with code that may have one."""


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
        batch: any rows, on the host.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    model.train()
    out = objective(model, send_to_device(without_row_id(batch), accelerator.device))
    accelerator.backward(out.loss)
    model.zero_grad()
