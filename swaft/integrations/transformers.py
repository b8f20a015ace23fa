"""Weight averaging and noise stability inside transformers' `Trainer`, `Seq2SeqTrainer` and TRL's trainers.

    trainer = Trainer(..., callbacks=[WeightAveragingCallback(swaft.SWA(start=0.5)), NoiseCallback(swaft.R3F(...))])
    trainer.train()
    with averaged_weights(trainer):
        trainer.evaluate()

Both callbacks need the trainer that calls them, which transformers does not pass (transformers#31338). They find it
on the call stack, once, when training begins.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from transformers import ProgressCallback, Seq2SeqTrainer, Trainer, TrainerCallback

from swaft.averaging import WeightAverager
from swaft.averaging.rules import Rule
from swaft.errors import AveragingError, ConfigError, NoiseError, StateError
from swaft.noise import R4F
from swaft.noise.inputs import count_items, find_targets

logger = logging.getLogger(__name__)

STATE = "averages"
"""Folder of the averages inside a checkpoint of the Trainer."""
OBJECTIVE_STATE = "noise.json"
"""File of an objective's state inside a checkpoint of the Trainer."""
EXPORT = "final-averaged"
"""Folder of the averaged model inside the Trainer's `output_dir`."""
OWN_LOSSES = ("SFTTrainer",)
"""Trainers whose own loss is the one that a noise objective computes too: the mean cross entropy of the labels."""


REPLACED = ("compute_loss", "get_batch_samples", "log")
"""Methods of a Trainer that a noise objective stands in for while it trains."""
TRAIN_NOISE: WeakSet[Trainer] = WeakSet()
"""The Trainers in which one does."""


class WeightAveragingCallback(TrainerCallback):
    """Averages the weights of a Trainer's run, evaluates both kinds of weights, and exports the averaged ones.

    * It attaches when training begins, and takes in real optimizer steps.
    * Every evaluation scores both weights. The scores of the averaged ones are in the same metrics, as
      ``eval_averaged_loss`` and so on, so ``metric_for_best_model="averaged_loss"`` and early stopping use them.
    * Every checkpoint holds the averages in its folder ``averages``, each rank its own elements; a run that resumes
      continues them by itself.
    * At the end the average is written to ``output_dir/final-averaged`` as a Hugging Face folder. With
      ``load_best_model_at_end`` it is the average of the best checkpoint, as the model then has that checkpoint's
      weights; of the whole run where that checkpoint is older than the first average.

    The live weights have the same bits as without the callback: an evaluation of averaged weights moves no random
    state.

    Args:
        rule: which steps enter the average, and with what weight; or several rules by name, of which the first is
            evaluated and exported.
        options: keyword arguments of `swaft.WeightAverager`: ``precision``, ``threads``, ``spill_dir``.

    Raises:
        ConfigError: when training begins: the Trainer has this callback twice, the export folder exists, the best
            model is chosen by the averaged score before anything is averaged, or its averages would not be saved.
        StateError: when training resumes: the checkpoint has no averages (the message names the latest that has),
            or those of other rules.
    """

    def __init__(self, rule: Rule | Mapping[str, Rule], **options: Any):
        self.rule, self.options = rule, options
        self.averager: WeightAverager | None = None
        """Of the run that trains, or trained last; None before the first."""
        self._averaged_scores: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the prepared model, and resume from the checkpoint that the Trainer resumes from."""
        self._trainer, resumed_from = _calling_trainer()
        if len([each for each in _callbacks(self._trainer) if isinstance(each, WeightAveragingCallback)]) > 1:
            raise ConfigError(
                "the Trainer has WeightAveragingCallback twice; expected one: give it several rules by name, "
                'WeightAveragingCallback({"swa": swaft.SWA(), "ema": swaft.EMA()})'
            )
        if self._trainer.hp_search_backend is not None:
            raise ConfigError(
                "hyperparameter_search starts many runs in one Trainer, each in a folder of its own; expected "
                "train(). Leave WeightAveragingCallback out of the search, and train with it afterwards"
            )
        if args.load_best_model_at_end and args.save_only_model:
            raise ConfigError(
                "load_best_model_at_end with save_only_model: checkpoints hold no averages, so that of the best "
                "one would be lost; set save_only_model=False, or load_best_model_at_end=False"
            )
        self._export = Path(args.output_dir) / EXPORT
        if self._export.exists():
            raise ConfigError(
                f"{self._export} exists, and the averaged model of this run would be written there; move it away, "
                "or set another output_dir"
            )
        if self.averager is not None:
            self.averager.close()
        self.averager = WeightAverager(
            self._trainer.model_wrapped,
            self._trainer.optimizer,
            rule=self.rule,
            total_steps=state.max_steps,
            first_step=state.global_step,
            **self.options,
        )
        if state.global_step:
            folder = resumed_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.averager.load_state(_require_state(folder))
        _require_average_when_chosen_by(args, state, self.averager)
        if "evaluate" not in vars(self._trainer):
            self._trainer.evaluate = self._evaluating_both(self._trainer.evaluate)
        # Callbacks that read scores (early stopping) come after this one, which adds those of the average.
        callbacks = _callbacks(self._trainer)
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the weights in, where the rule wants them."""
        self._attached.step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Add the scores of the averaged weights to those of the live ones."""
        if metrics is not None:
            metrics.update(self._averaged_scores)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the averages into the checkpoint that the Trainer has just written."""
        if not args.save_only_model:
            folder = Path(self._trainer._get_output_dir(None)) / f"checkpoint-{state.global_step}"
            self._attached.save_state(folder / STATE, overwrite=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the averaged model, beside its tokenizer."""
        averager = self._attached
        averager.wait()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._follow_best(Path(state.best_model_checkpoint), state.best_global_step)
        if not averager.num_averaged:
            logger.warning(
                "nothing was averaged: training ended at step %d, before the rule's", state.global_step
            )
            return
        averager.save_pretrained(self._export)
        tokenizer = self._trainer.processing_class
        with averager.engine.ranks.together(f"the tokenizer could not be written to {self._export}"):
            if tokenizer is not None and averager.engine.ranks.rank == 0:
                tokenizer.save_pretrained(self._export)

    def _follow_best(self, checkpoint: Path, step: int) -> None:
        """Load the averages of the best checkpoint, where there were some by then."""
        first = self._attached.plan().first_step
        if step < first:
            logger.warning(
                "the best checkpoint is of step %d, before averaging began at step %d: %s holds the average of the "
                "whole run", step, first, self._export,
            )  # fmt: skip
        else:
            self._attached.load_state(_require_state(checkpoint))
            logger.info("%s holds the average of %s, the best checkpoint", self._export, checkpoint)

    @property
    def _attached(self) -> WeightAverager:
        assert self.averager is not None
        return self.averager

    def _evaluating_both(self, evaluate: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        """Wrap a Trainer's `evaluate`: first the averaged weights, in silence, then the live ones as always."""

        @functools.wraps(evaluate)
        def both(*args: Any, **kwargs: Any) -> dict[str, float]:
            averager = self._attached
            inside = (
                averager.engine.swap.active or self._averaged_scores
            )  # a dictionary of datasets calls again for each
            if inside or not averager.num_averaged:
                return evaluate(*args, **kwargs)
            named = dict(kwargs)
            prefix = args[2] if len(args) > 2 else named.pop("metric_key_prefix", "eval")
            with averager.swapped_in(), _kept_random_state(), _unheard(self._trainer, "on_evaluate"):
                scores = evaluate(*args[:2], metric_key_prefix=f"{prefix}_averaged", **named)
            self._averaged_scores = scores
            try:
                return evaluate(*args, **kwargs)
            finally:
                self._averaged_scores = {}

        return both


class NoiseCallback(TrainerCallback):
    """Trains a noise objective in place of the Trainer's loss; evaluations keep the Trainer's own.

    The loss of a step is the mean over the rows that count in it (texts, ends of answers, target tokens), on all
    ranks and however many micro-batches it has. Log lines gain the means of ``task_loss``, ``divergence`` and
    ``noise_to_signal`` on rank 0. The step that sets the noise is in every checkpoint, and is resumed from there.

    Args:
        objective: such as ``swaft.R3F(preset="relative", sigma=0.5)``.

    Raises:
        NoiseError: when training begins: R4F, whose head the Trainer cannot save; a trainer with another loss than
            the mean cross entropy of the labels (DPO, a subclass with a `compute_loss` of its own),
            `compute_loss_func`, `label_smoothing_factor` (give it to the objective), or several devices in one
            process.
        StateError: when training resumes: the checkpoint holds no state of an objective.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        self._seen: list[Any] = []
        self._counted = torch.ones(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the objective in place of the loss, and resume its step."""
        self._trainer, resumed_from = _calling_trainer()
        if len([each for each in _callbacks(self._trainer) if isinstance(each, NoiseCallback)]) > 1:
            raise NoiseError("the Trainer has NoiseCallback twice; expected one objective")
        _require_plain_loss(self._trainer, self.objective)
        if state.global_step:
            folder = resumed_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.objective.load_state_dict(_read_objective_state(folder))
        self._seen.clear()
        self._put_back()  # what a training that failed has left
        TRAIN_NOISE.add(self._trainer)
        self._trainer.compute_loss = self._in_place_of(self._trainer.compute_loss)
        self._trainer.get_batch_samples = self._counting(self._trainer.get_batch_samples)
        self._trainer.log = self._logging(self._trainer.log)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its own loss back."""
        self._put_back()

    def _put_back(self) -> None:
        if self._trainer in TRAIN_NOISE:
            TRAIN_NOISE.discard(self._trainer)
            for name in REPLACED:
                vars(self._trainer).pop(name, None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the objective's step into the checkpoint that the Trainer has just written."""
        if args.should_save and not args.save_only_model:
            folder = Path(self._trainer._get_output_dir(None)) / f"checkpoint-{state.global_step}"
            (folder / OBJECTIVE_STATE).write_text(json.dumps(self.objective.state_dict()))

    def _in_place_of(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute_loss)
        def noisy(
            model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not model.training or self not in _callbacks(self._trainer):
                return compute_loss(model, inputs, return_outputs, num_items_in_batch)
            out = self.objective(model, inputs)
            self._seen.append(out.logged)
            # The engine takes the mean over ranks. The Trainer divides by the micro-batches, unless it believes
            # that the loss was divided by the items of the step.
            scaled = self._trainer.loss_is_scaled_for_ga
            if scaled is None:
                scaled = self._trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            means = self._trainer.accelerator.num_processes
            means *= 1 if scaled else self._trainer.current_gradient_accumulation_steps
            loss = out.loss * (out.num_items * means / self._counted)
            return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss

        return noisy

    def _counting(self, get_batch_samples: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the reading of a step's micro-batches: count the rows that its loss is the mean of, on all ranks.

        The Trainer's own count is of ``labels`` alone, and of all of them where a model shifts them by itself.
        """

        @functools.wraps(get_batch_samples)
        def counted(iterator: Any, number: int, device: torch.device) -> tuple[list[Any], Any]:
            batches, num_items = get_batch_samples(iterator, number, device)
            items = sum(self._rows(batch) for batch in batches)
            total = self._trainer.accelerator.reduce(torch.as_tensor(items, device=device))
            self._counted = total.clamp(min=1)  # nothing to learn from a step in which nothing counts
            return batches, num_items

        return counted

    def _rows(self, batch: dict[str, Any]) -> int | torch.Tensor:
        targets = find_targets(self._trainer.model, batch)
        return len(next(iter(batch.values()))) if targets is None else count_items(targets)

    def _logging(self, log: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(log)
        def with_divergence(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self._seen:
                for name in ("task_loss", "divergence", "noise_to_signal"):
                    logs[name] = torch.stack([each[name].float() for each in self._seen]).mean().item()
                self._seen.clear()
            log(logs, *args, **kwargs)

        return with_divergence


@contextmanager
def averaged_weights(trainer: Trainer, name: str | None = None) -> Iterator[None]:
    """Give a Trainer's model its averaged weights, for an evaluation or a prediction (collective).

    Args:
        trainer: with a `WeightAveragingCallback`, during or after training.
        name: which rule's average; None: the first.

    Raises:
        AveragingError: the trainer has no such callback, has not begun to train, or nothing is averaged yet.
    """
    callback = next((each for each in _callbacks(trainer) if isinstance(each, WeightAveragingCallback)), None)
    if callback is None:
        raise AveragingError(
            "the Trainer has no WeightAveragingCallback; expected Trainer(..., "
            "callbacks=[WeightAveragingCallback(swaft.SWA(start=0.5))])"
        )
    if callback.averager is None:
        raise AveragingError("the Trainer has averaged nothing yet; call trainer.train() first")
    with callback.averager.swapped_in(name):
        yield


def _calling_trainer() -> tuple[Any, Path | None]:
    """Find the Trainer whose loop calls a callback, and the folder that the loop resumes from, where it does."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return frame.f_locals["self"], None if folder is None else Path(folder)
        frame = frame.f_back
    raise ConfigError(
        "a callback of swaft was called by no Trainer; pass it to Trainer(..., callbacks=[...])"
    )


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callback_handler.callbacks


def _require_average_when_chosen_by(args: Any, state: Any, averager: WeightAverager) -> None:
    """Refuse to choose the best model by the averaged score of an evaluation at which nothing is averaged yet.

    Raises:
        ConfigError: with the `eval_delay` that helps.
    """
    chosen_by = (args.metric_for_best_model or "").removeprefix("eval_")
    first_member = averager.plan().first_step
    if not chosen_by.startswith("averaged_") or averager.num_averaged:
        return
    per_epoch = state.max_steps / state.num_train_epochs
    if args.eval_strategy == "epoch":
        first, delay = math.ceil(max(args.eval_delay, 1)) * per_epoch, math.ceil(first_member / per_epoch)
    else:
        first, delay = math.ceil(max(args.eval_delay, 1) / state.eval_steps) * state.eval_steps, first_member
    if first < first_member or args.eval_on_start:
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model} at an evaluation after {first:.0f} steps, but "
            f"nothing is averaged before step {first_member}; set eval_delay={delay}, or begin to average earlier"
        )


def _require_state(checkpoint: Path) -> Path:
    """Return the averages of a checkpoint; without any, name the latest checkpoint beside it that has some."""
    if (checkpoint / STATE).is_dir():
        return checkpoint / STATE
    others = [each.parent for each in checkpoint.parent.glob(f"checkpoint-*/{STATE}/COMPLETE")]
    latest = max(
        (each.parent for each in others), key=lambda each: int(each.name.rpartition("-")[2]), default=None
    )
    advice = (
        f"resume from {latest}, the latest that has some"
        if latest
        else "train from the beginning, or without averaging"
    )
    raise StateError(
        f"{checkpoint} has no averages: it was written without averaging, or the run was killed before they were "
        f"written; {advice}"
    )


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
        NoiseError: naming what is in the way.
    """
    if isinstance(objective, R4F):
        raise NoiseError(
            "R4F normalises the head by a parametrization, under whose names the Trainer would save weights that "
            "from_pretrained does not find; expected R3F or RDrop. Train R4F with swaft's recipes, or call it in a "
            "loop of your own"
        )
    own = type(trainer).compute_loss
    plain = own in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
    if not plain and own.__qualname__.split(".")[0] not in OWN_LOSSES:
        raise NoiseError(
            f"{own.__qualname__} is a loss of its own, which a noise objective would replace; expected Trainer, "
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
            f"label_smoothing_factor={factor:g} would be passed over by the objective; set it to 0 and give the "
            f"objective label_smoothing={factor:g}"
        )
    if trainer.args.n_gpu > 1:
        raise NoiseError(
            f"{trainer.args.n_gpu} devices in one process (DataParallel); start one process a device: torchrun "
            f"--nproc_per_node {trainer.args.n_gpu}"
        )


@contextmanager
def _unheard(trainer: Any, event: str) -> Iterator[None]:
    """Keep an event from the callbacks, but for the progress bar, which closes the bar of an evaluation on it."""
    handler = trainer.callback_handler
    bars = [each for each in handler.callbacks if isinstance(each, ProgressCallback)]

    def heard_by_bars(args: Any, state: Any, control: Any, *rest: Any) -> Any:
        for bar in bars:
            getattr(bar, event)(args, state, control)
        return control

    setattr(handler, event, heard_by_bars)
    try:
        yield
    finally:
        delattr(handler, event)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Leave every generator as it was: a loader draws a seed whenever it is iterated over."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
