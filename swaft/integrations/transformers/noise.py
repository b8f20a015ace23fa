"""A noise objective in place of a Trainer's loss."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from swaft.errors import NoiseError, StateError
from swaft.integrations.transformers.calling import (
    calling_trainer,
    checkpoint_of,
    require_told_of_checkpoints,
    those_of_kind,
)
from swaft.noise import R4F
from swaft.noise.inputs import as_arguments, count_averaged
from swaft.noise.objectives import Resumable

OBJECTIVE_STATE = "noise.json"
"""File of an objective's state inside a checkpoint of the Trainer."""
OWN_LOSSES = ("SFTTrainer",)
"""Trainers whose own loss is the same as a noise objective's task loss: the mean cross entropy of the labels."""
REPLACED = ("compute_loss", "get_batch_samples", "log")
"""Methods of a Trainer that a noise objective replaces while it trains."""
LOGGED = ("task_loss", "divergence", "noise_to_signal")
"""Numbers added to each line of the log if the objective measures them."""
TRAIN_NOISE: WeakSet[Trainer] = WeakSet()
"""The Trainers in which a noise objective currently does so."""


class NoiseCallback(TrainerCallback):
    """Trains a noise objective instead of the Trainer's loss; evaluations keep the Trainer's own loss.

    The loss of a step is the mean over the rows that count in it (texts, ends of answers, target tokens), over all
    ranks and micro-batches. Log lines gain ``task_loss``, ``divergence`` and, with noise, ``noise_to_signal``,
    which are means of the same kind. The step that determines the noise is saved in every checkpoint, and is
    resumed from there.

    Args:
        objective: such as ``swaft.R3F(preset="relative", sigma=0.5)``.

    Raises:
        NoiseError: this is no objective. When training begins: R4F, whose head the Trainer cannot save; a trainer
            with another loss than the mean cross entropy of the labels (DPO, a subclass with its own
            `compute_loss`), `compute_loss_func`, `label_smoothing_factor` (pass it to the objective instead), or
            several devices in one process. After the first step: a subclass whose `training_step` does not call
            `compute_loss`.
        ConfigError: when training begins, with ``enable_jit_checkpoint``: its checkpoint would hold no step.
        StateError: when training resumes: the checkpoint holds no state of an objective.
    """

    def __init__(self, objective: Any):
        if isinstance(objective, type) or not callable(objective):
            raise NoiseError(
                f"objective is {objective!r}; expected one, such as swaft.R3F(preset='relative')"
            )
        self.objective: Any = objective
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._own: dict[str, Any] = {}  # methods that had been replaced on the Trainer before
        self._counted = torch.ones(())
        self._computed = False  # whether the objective has computed a loss since training began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace the loss by the objective, and resume its step."""
        self._trainer, resumed_from = calling_trainer()
        require_told_of_checkpoints(args)
        if len(those_of_kind(self._trainer, NoiseCallback)) > 1:
            raise NoiseError("the Trainer has NoiseCallback twice; expected one objective")
        self._put_back()  # left over from a failed training
        _require_plain_loss(self._trainer, self.objective)
        if state.global_step:
            self.objective.load_state_dict(_read_objective_state(resumed_from or checkpoint_of(args, state)))
        self._sums, self._steps, self._computed = {}, 0, False
        self._own = {name: vars(self._trainer)[name] for name in REPLACED if name in vars(self._trainer)}
        TRAIN_NOISE.add(self._trainer)
        self._trainer.compute_loss = self._in_place_of(self._trainer.compute_loss)
        self._trainer.get_batch_samples = self._counting(self._trainer.get_batch_samples)
        self._trainer.log = self._logging(self._trainer.log)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train another loss than the objective's."""
        if not self._computed:
            method = type(self._trainer).training_step.__qualname__
            raise NoiseError(
                f"the loss of step {state.global_step} did not come from the objective: {method} does not call "
                "self.compute_loss, or the model is in evaluation mode; expected compute_loss to be called, on a "
                "model in training mode. Change that, or leave NoiseCallback out and call the objective there"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its own loss back."""
        if isinstance(self.objective, Resumable):
            self.objective.finish()
        self._put_back()

    def _put_back(self) -> None:
        if self._trainer in TRAIN_NOISE:
            TRAIN_NOISE.discard(self._trainer)
            for name in REPLACED:
                vars(self._trainer).pop(name, None)
            vars(self._trainer).update(self._own)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the objective's step into the checkpoint that the Trainer has just written."""
        if args.should_save and not args.save_only_model:
            (checkpoint_of(args, state) / OBJECTIVE_STATE).write_text(json.dumps(self.objective.state_dict()))

    def _in_place_of(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute_loss)
        def noisy(
            model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not model.training or self not in self._trainer.callback_handler.callbacks:
                return compute_loss(model, inputs, return_outputs, num_items_in_batch)
            out = self.objective(model, inputs)
            self._computed = True
            share = out.num_items / self._counted
            measured = {name: value.float() * share for name, value in out.logged.items() if name in LOGGED}
            self._sums = {name: self._sums.get(name, 0.0) + value for name, value in measured.items()}
            # The engine averages over ranks. The Trainer divides by the number of micro-batches, unless it assumes
            # that the loss is already divided by the items of the step.
            scaled = self._trainer.loss_is_scaled_for_ga
            if scaled is None:
                scaled = self._trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            means = self._trainer.accelerator.num_processes
            means *= 1 if scaled else self._trainer.current_gradient_accumulation_steps
            # Not `share * means`: equal micro-batches give exactly 1 only in this order.
            loss = out.loss * (out.num_items * means / self._counted)
            return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss

        return noisy

    def _counting(self, get_batch_samples: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the reading of a step's micro-batches: count the rows that its loss is averaged over, on all ranks.

        The Trainer only counts ``labels``, of which question answering has none, and only for models that take the
        number. Versions before 5.23 may include the first token of a text, which no model that shifts predicts.
        """

        @functools.wraps(get_batch_samples)
        def counted(iterator: Any, number: int, device: torch.device) -> tuple[list[Any], Any]:
            batches, num_items = get_batch_samples(iterator, number, device)
            items = sum(count_averaged(self._trainer.model, as_arguments(batch)) for batch in batches)
            total = self._trainer.accelerator.reduce(torch.as_tensor(items, device=device))
            self._counted = total.clamp(min=1)  # nothing to learn from a step in which nothing counts
            self._steps += bool(batches)  # without rows, an iterable dataset has come to its end
            return batches, num_items

        return counted

    def _logging(self, log: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(log)
        def with_divergence(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self._sums:
                totals: Any = self._trainer.accelerator.reduce(self._sums)
                logs |= {name: float(total / self._steps) for name, total in totals.items()}
                self._sums, self._steps = {}, 0
            log(logs, *args, **kwargs)

        return with_divergence


def _read_objective_state(checkpoint: Path) -> dict[str, int]:
    path = checkpoint / OBJECTIVE_STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} cannot be read ({error}): the checkpoint was written without a noise objective, or the run "
            "was killed before its state was written; resume from an earlier checkpoint, or without NoiseCallback"
        ) from error


def _require_plain_loss(trainer: Trainer, objective: Any) -> None:
    """Refuse a trainer whose loss is not the mean cross entropy that a noise objective computes, and R4F.

    Raises:
        NoiseError: names what is in the way.
    """
    if isinstance(objective, R4F):
        raise NoiseError(
            "R4F normalises the head with a parametrization, and the Trainer would save its weights under names "
            "that from_pretrained does not find; expected R3F or RDrop. Train R4F with swaft's recipes, or call it "
            "in a loop of your own"
        )
    own: Any = vars(trainer).get("compute_loss", type(trainer).compute_loss)
    own = getattr(own, "__func__", own)
    name = getattr(own, "__qualname__", type(own).__name__)
    plain = own in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
    if not plain and name.split(".")[0] not in OWN_LOSSES:
        raise NoiseError(
            f"{name} is a loss of its own, which a noise objective would replace; expected Trainer, "
            "Seq2SeqTrainer or SFTTrainer. Leave NoiseCallback out, or call the objective in that method"
        )
    kind = getattr(trainer.args, "loss_type", "nll")
    if kind != "nll":
        raise NoiseError(
            f"loss_type={kind} of SFTConfig is a loss of its own, which an objective would replace; set "
            "loss_type='nll', or leave NoiseCallback out"
        )
    if trainer.compute_loss_func is not None:
        raise NoiseError(
            "compute_loss_func is a loss of its own, which a noise objective would replace; leave one out"
        )
    if trainer.label_smoother is not None:
        factor = trainer.args.label_smoothing_factor
        raise NoiseError(
            f"label_smoothing_factor={factor:g} would be ignored by the objective; set it to 0 and give the "
            f"objective label_smoothing={factor:g}"
        )
    if trainer.args.n_gpu > 1:
        raise NoiseError(
            f"{trainer.args.n_gpu} devices in one process (DataParallel); start one process per device: torchrun "
            f"--nproc_per_node {trainer.args.n_gpu}"
        )
