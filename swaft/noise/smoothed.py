"""Plain fine-tuning towards smoothed labels."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn

from swaft.noise.inputs import IGNORE_INDEX, count_items, prepare_inputs
from swaft.noise.objectives import ObjectiveOutput, Resumable
from swaft.noise.outputs import task_logits
from swaft.noise.presets import resolve_settings
from swaft.noise.proof import prove


class SmoothedTaskLoss(Resumable):
    """The task loss of one pass, a share of each target spread over all classes.

    The mean of the cross entropy over the counted rows, as `TaskLoss` has it from the model itself; a model that
    trains another loss is refused.

    Args:
        label_smoothing: the share, 0 to below 1.

    Raises:
        ConfigError: for a share out of range.
    """

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        # Of what the proof reads: no noise, and no masks that passes would have to share.
        self._settings = resolve_settings("rdrop", generates=True, label_smoothing=label_smoothing)
        self._proved: WeakSet[nn.Module] = WeakSet()

    def prepare_model(self, model: nn.Module) -> None:
        """Nothing to prepare: what the model's own loss is shows on the first batch."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run one pass; the first call with a model proves, without gradient, that its loss is the one replaced.

        Args:
            model: the model as returned by ``accelerator.prepare``.
            batch: keyword arguments of its forward, labels included.

        Raises:
            NoiseError: for a batch without labels, or a model whose own loss is no mean cross entropy.
        """
        inputs = prepare_inputs(model, batch)
        if model not in self._proved and prove(
            model,
            batch,
            site=None,
            head=None,
            disturb=lambda embedding: embedding,
            settings=self._settings,
            objective="label smoothing",
        ):
            self._proved.add(model)
        logits = task_logits(model(**inputs.arguments))
        loss = nn.functional.cross_entropy(
            logits.flatten(0, -2).float(),
            inputs.targets.flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
        )
        return ObjectiveOutput.of_task(loss, logits, count_items(inputs.targets))
