"""The buckets in which DDP sums gradients, settled before a run goes on."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swaft.training.evaluate import without_row_id


def settle_buckets(accelerator: Accelerator, model: nn.Module, objective: Any, batch: dict[str, Any]) -> None:
    """Take one backward pass for the sake of the order in which gradients arrive (collective under DDP).

    After its first backward pass DDP puts gradients into other buckets, by the order in which they arrived. Of
    three ranks and more, the rounding of a sum depends on where in its bucket an element lies; so a process that
    goes on would take its first step with other last bits than the run it goes on with. Gradients are dropped
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
