"""What DDP needs to know about a model before its first step, and before the first step of a resumed run."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swaft.distributed import shared_ranks

logger = logging.getLogger(__name__)

LEAVE_WEIGHTS_UNUSED = frozenset(
    {
        *("axk2", "big_bird", "canine", "encoder-decoder", "esm", "fnet", "layoutlmv3", "led", "lilt"),
        *("luke", "markuplm", "mra", "squeezebert", "t5gemma2", "xlnet"),
    }
)
"""Types with trained weights that get no gradient from rows of text in some task: poolers, global attention."""
OTHER_PARTS = ("vision_config", "audio_config", "auto_map")
"""Configuration entries for a part that text does not go through, or for code that may have one."""


def allow_unused_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Make DDP look for weights without a gradient, if a model's type has some; it would wait for them otherwise.

    Args:
        accelerator: nothing prepared yet; engines other than DDP need no change.
        model: a transformers model, or adapters on one.
    """
    config: Any = getattr(model, "config", None)
    unused = getattr(config, "model_type", None) in LEAVE_WEIGHTS_UNUSED
    if unused or any(getattr(config, name, None) for name in OTHER_PARTS):
        handler: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = handler


def settle_buckets(accelerator: Accelerator, model: nn.Module, objective: Any, batch: dict[str, Any]) -> None:
    """Run one backward pass so that DDP fixes its gradient buckets (collective under DDP).

    After its first backward pass DDP rebuilds its buckets, by the order in which gradients arrived. With three or
    more ranks, the rounding of a sum depends on an element's place in its bucket; so without this, the first step
    of a resumed process would differ in the last bits from the run it continues. The gradients are dropped;
    whatever else the pass changes (generators, buffers, the objective's count) has to be restored afterwards.

    The loop of a copied recipe may compute its loss itself. If the objective cannot compute one, the run resumes
    without this pass, with a warning.

    Args:
        accelerator: the one that prepared the model.
        model: the prepared model; anything but DDP is left alone.
        objective: loss of a micro-batch.
        batch: inputs of the model, from any rows, on the host.
    """
    if isinstance(model, DistributedDataParallel):
        model.train()
        loss, error = None, None
        try:
            loss = objective(model, send_to_device(batch, accelerator.device)).loss
        except Exception as found:  # whatever an objective of one's own raises
            error = f"{type(found).__name__}: {found}"
        errors = [each for each in shared_ranks().gather(error) if each is not None]
        if errors:
            logger.warning(
                "the objective given to run.prepare cannot compute a loss (%s), so the first step after resuming "
                "may differ in its last bits; give a callable that returns the loss of your loop as .loss",
                errors[0],
            )
            return
        accelerator.backward(loss)
        model.zero_grad()
