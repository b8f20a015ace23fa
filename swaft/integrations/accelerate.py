"""Averages inside `accelerator.save_state` and `accelerator.load_state`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swaft.averaging import WeightAverager
from swaft.errors import ConfigError, StateError


def register_averager(accelerator: Any, averager: WeightAverager) -> None:
    """Make an accelerator's checkpoints include the averages; every rank saves its own elements.

        averager = swaft.WeightAverager(model, optimizer, rule=swaft.EMA(half_life=0.1), total_steps=n)
        register_averager(accelerator, averager)
        ...
        accelerator.save_state("step-500")   # the averages are in its folder "averages"
        accelerator.load_state("step-500")   # and are resumed with model and optimizer

    A second averager's averages are in ``averages-1``, and so on. An averager of the same model with a new
    optimizer replaces the old one, so a notebook's cell may be run again.

    Args:
        accelerator: an `accelerate.Accelerator` whose model and optimizer are prepared.
        averager: of that model.

    Raises:
        ConfigError: the averager is already registered.
        StateError: raised by `load_state` if the folder has no averages, or those of other rules or weights.
    """
    others = [each for each in accelerator._custom_objects if isinstance(each, _Carried)]
    if any(each.averager is averager for each in others):
        raise ConfigError("the averager is registered already; expected one call of register_averager for it")
    for each in others:
        old, new = each.averager.engine, averager.engine
        if old.module is new.module and old.inner_optimizer is not new.inner_optimizer:
            each.averager = averager
            return
    carried = _Carried(averager, f"averages-{len(others)}" if others else "averages")
    accelerator.register_save_state_pre_hook(carried.save)
    accelerator.register_load_state_pre_hook(carried.remember)
    accelerator.register_for_checkpointing(carried)


class _Carried:
    """An averager among the objects of a checkpoint.

    accelerate calls load hooks on every rank, but before it has loaded anything. It loads registered objects on
    every rank, after model and optimizer, but saves only those of rank 0. So a hook saves, and an object loads.
    """

    def __init__(self, averager: WeightAverager, folder: str):
        self.averager, self.folder = averager, folder

    def save(self, models: Any, weights: Any, output_dir: str) -> None:
        self.averager.save_state(Path(output_dir) / self.folder, overwrite=True)

    def remember(self, models: Any, input_dir: str) -> None:
        self._from = Path(input_dir) / self.folder
        with self.averager.engine.ranks.together():
            if not self._from.is_dir():
                raise StateError(
                    f"{input_dir} holds no averages (there is no {self.folder}): it was written before "
                    "register_averager was called; resume from another checkpoint, or without averaging"
                )

    def state_dict(self) -> dict[str, str]:
        return {"averages": self.folder}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if state.get("averages") != self.folder:
            raise StateError(
                f"{self._from.parent} holds no averages where they are expected ({state}); register the averager "
                "and other objects in the same order as when the checkpoint was written"
            )
        self.averager.load_state(self._from)
