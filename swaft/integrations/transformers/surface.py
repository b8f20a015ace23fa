"""Loss between a Trainer's last and averaged weights, and around them, for the page of its run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch.utils.data import Subset
from transformers import Trainer

from swaft.errors import ConfigError
from swaft.integrations.transformers.averaging import averaged_weights
from swaft.report.landscape import loss_surface, write_losses


def write_surface(trainer: Trainer, *, rows: int = 256, eval_dataset: Any = None) -> None:
    """Compute the losses that ``swaft report`` draws as flatness, and write them into the Trainer's ``output_dir``
    (collective).

    Call it after training, in one process or under DDP. It takes 41 evaluations of the loss on these rows, and
    three times the memory of the weights. The live weights are restored afterwards.

    Args:
        trainer: with a `WeightAveragingCallback`, after training.
        rows: number of rows to use, from the start of the data set.
        eval_dataset: a single data set; None: the Trainer's.

    Raises:
        AveragingError: the trainer has averaged nothing.
        ConfigError: its weights are sharded, both kinds of weights are equal, or there is no single data set.
    """
    if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ConfigError(
            "write_surface needs whole weights on every rank, which DeepSpeed and FSDP do not keep; expected one "
            "process, or DDP"
        )
    found_in: Any = trainer.eval_dataset if eval_dataset is None else eval_dataset
    if isinstance(found_in, dict) or not hasattr(found_in, "__len__"):
        raise ConfigError("write_surface needs one data set of numbered rows; name it: eval_dataset=...")
    model: Any = trainer.model
    with averaged_weights(trainer):
        averaged = copy.deepcopy(model)
    first: Any = Subset(found_in, range(min(rows, len(found_in))))
    loader = trainer.get_test_dataloader(first)

    def loss() -> float:
        scored = trainer.evaluation_loop(
            loader, "Surface", prediction_loss_only=True, metric_key_prefix="surface"
        )
        return (scored.metrics or {})["surface_loss"]

    handler: Any = trainer.callback_handler
    # One bar for all points, not one per point.
    handler.on_prediction_step = lambda args, state, control: control
    try:
        found = loss_surface(model, averaged, loss)
    finally:
        del handler.on_prediction_step
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_losses(folder, found, rows=len(first))
