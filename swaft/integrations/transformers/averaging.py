"""Averages inside a Trainer: both weights evaluated, averages in its checkpoints, a folder at the end."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from swaft.averaging import WeightAverager
from swaft.averaging.rules import RECOMMENDED, Rule
from swaft.averaging.state import KIND, AverageState
from swaft.distributed import shared_ranks
from swaft.errors import AveragingError, ConfigError, StateError
from swaft.integrations.transformers.calling import (
    calling_trainer,
    checkpoint_of,
    require_told_of_checkpoints,
    those_of_kind,
)
from swaft.storage import is_complete, read_manifest
from swaft.storage.sealed import step_of
from swaft.storage.together import require_shared

logger = logging.getLogger(__name__)

STATE = "averages"
"""Folder of the averages inside a checkpoint of the Trainer."""
EXPORT = "final-averaged"
"""Folder of the averaged model inside the Trainer's `output_dir`."""
FP16_SKIPS = 20
"""Steps that a loss scale which begins at 2**16, and is halved at each skip, may skip at first, and a few more."""
SCORES_BOTH = "scores_both_weights"
"""Mark of a Trainer's `evaluate` that scores the averaged weights, too."""
PREFIX = "metric_key_prefix"
"""Parameter of a Trainer's `evaluate` that prefixes the names of scores."""


class WeightAveragingCallback(TrainerCallback):
    """Averages the weights of a Trainer's run, evaluates both kinds of weights, and exports the averaged ones.

    * It attaches when training begins, and counts only optimizer steps that change the weights.
    * Every evaluation scores both weights. The scores of the averaged weights are in the same metrics, as
      ``eval_averaged_loss`` and so on, so ``metric_for_best_model="averaged_loss"`` and early stopping use them.
      ``eval_averaged_drift`` is how far the average is from the live weights.
    * Every checkpoint holds the averages in its folder ``averages``, with each rank's own elements; a run that
      resumes continues them automatically.
    * At the end the average is written to ``output_dir/final-averaged`` as a Hugging Face folder. With
      ``load_best_model_at_end`` it is the average at the best checkpoint, since the model then has that
      checkpoint's weights; or the average of the whole run if that checkpoint is older than the first member.

    The live weights have the same bits as without the callback: evaluating averaged weights does not touch any
    random state.

    Args:
        rule: which steps enter the average, and with what weight; or several rules by name, of which the first is
            evaluated and exported. Default: as in `swaft.WeightAverager`.
        options: keyword arguments of `swaft.WeightAverager`: ``precision``, ``threads``, ``spill_dir``.

    Raises:
        ConfigError: when training begins: the Trainer has this callback twice, the export folder exists, the best
            model is chosen by the averaged score before anything is averaged, averages would be missing from
            checkpoints (of the best model, or with ``enable_jit_checkpoint``), not all machines see the folder of
            the checkpoints, or the optimizer itself averages (schedule-free).
        StateError: when training resumes: the checkpoint has no averages (the message names the latest one that
            has), or those of other rules.
    """

    def __init__(self, rule: Rule | Mapping[str, Rule] = RECOMMENDED, **options: Any):
        self.rule, self.options = rule, options
        self.averager: WeightAverager | None = None
        """The averager of the current or most recent run; None before the first."""
        self.averaged_scores: dict[str, float] = {}
        """Averaged scores of the evaluation in progress; empty between evaluations."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the prepared model, and resume from the checkpoint that the Trainer resumes from."""
        self._trainer, resumed_from = calling_trainer()
        self._export = Path(args.output_dir) / EXPORT
        self._refuse_settings(args)
        if args.save_strategy != "no" and not args.save_only_model:
            _require_shared_output(Path(args.output_dir))
        if self.averager is not None:
            self.averager.close()
            self.averager = None  # its memory is for the next one
        self.averager = WeightAverager(
            self._trainer.model_wrapped,
            self._trainer.optimizer,
            rule=self.rule,
            total_steps=state.max_steps,
            first_step=state.global_step,
            **self.options,
        )
        # The Trainer does not exchange its optimizer, and after a failed run another Trainer may train the model.
        self.averager.engine.stop()
        exchanging = type(self.averager.engine.inner_optimizer)
        if callable(getattr(exchanging, "eval", None)):
            raise ConfigError(
                f"{exchanging.__name__} averages by itself, and swaps the weights for evaluations (eval()); "
                "expected another optim, or no WeightAveragingCallback"
            )
        if state.global_step:
            self.averager.load_state(_require_state(resumed_from or checkpoint_of(args, state)))
        _require_average_when_chosen_by(args, state, self.averager, kwargs["train_dataloader"])
        if not getattr(self._trainer.evaluate, SCORES_BOTH, False):
            self._trainer.evaluate = _evaluating_both(self._trainer)
        # Callbacks that read scores (early stopping) must come after this one, which adds the averaged scores.
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def _refuse_settings(self, args: Any) -> None:
        """Refuse a Trainer in which averages would be lost, or computed twice."""
        require_told_of_checkpoints(args)
        if len(those_of_kind(self._trainer, WeightAveragingCallback)) > 1:
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
                "load_best_model_at_end with save_only_model: checkpoints hold no averages, so the average of the "
                "best one would be lost; set save_only_model=False, or load_best_model_at_end=False"
            )
        if self._export.exists():
            raise ConfigError(
                f"{self._export} exists, and the averaged model of this run would be written there; move it away, "
                "or set another output_dir"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the weights in, if the rule uses this step."""
        self._attached.step()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Add the scores of the averaged weights to those of the live ones."""
        if metrics is not None:
            metrics.update(self.averaged_scores)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the averages into the checkpoint that the Trainer has just written."""
        if not args.save_only_model:
            self._attached.save_state(checkpoint_of(args, state) / STATE, overwrite=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the averaged model and its tokenizer."""
        averager = self._attached
        with averager.engine.ranks.together():  # a full disk on one machine, say
            averager.wait()
        note = ""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            note = self._follow_best(Path(state.best_model_checkpoint))
        if not averager.num_averaged:
            logger.warning(
                "nothing was averaged: training ended at step %d, before the rule's first member",
                state.global_step,
            )
            return
        averager.save_pretrained(self._export, note=note)
        # As the Trainer's own checkpoints find it.
        tokenizer = self._trainer.processing_class or getattr(self._trainer.data_collator, "tokenizer", None)
        with averager.engine.ranks.together(f"the tokenizer could not be written to {self._export}"):
            if tokenizer is not None and averager.engine.ranks.rank == 0:
                tokenizer.save_pretrained(self._export)

    def _follow_best(self, checkpoint: Path) -> str:
        """Load the averages of the best checkpoint, if averaging had begun by then; return a note for the card."""
        averages = _require_state(checkpoint)
        # Not by the Trainer's steps: it counts those that a loss scaler skips, and its best may have no checkpoint.
        held = AverageState.from_json(read_manifest(averages, kind=KIND).content, where=averages)
        if not held.rules[0].count:
            logger.warning(
                "%s, the best checkpoint, was written before averaging began: %s holds the average of the whole "
                "run",
                *(checkpoint, self._export),
            )
            return f" (of the whole run; {checkpoint.name}, the best, was written before averaging began)"
        self._attached.load_state(averages)
        if self._attached.num_averaged == 1:
            logger.warning(
                "averaging began at %s, the best checkpoint: %s holds its weights, of a single step",
                *(checkpoint, self._export),
            )
        logger.info("%s holds the average of %s, the best checkpoint", self._export, checkpoint)
        return f" (as of {checkpoint.name}, the best checkpoint)"

    def averager_of(self, trainer: Trainer) -> WeightAverager | None:
        """Return the averager of a Trainer's run; None if it has not trained, another Trainer has since, or it has
        been given another model.
        """
        if self.averager is None or self._trainer is not trainer:
            return None
        trained, held = self.averager.engine.module, self._trainer.model
        wraps = trained in set(held.modules()) or held in set(trained.modules())  # or is the same
        return self.averager if wraps else None

    @property
    def _attached(self) -> WeightAverager:
        assert self.averager is not None
        return self.averager


@contextmanager
def averaged_weights(trainer: Trainer, name: str | None = None) -> Iterator[None]:
    """Put the averaged weights into a Trainer's model, for an evaluation or a prediction (collective).

    Args:
        trainer: with a `WeightAveragingCallback`, during or after training.
        name: which rule's average; None: the first.

    Raises:
        AveragingError: the trainer has no such callback, has not started training, or nothing is averaged yet.
    """
    callback = next(iter(those_of_kind(trainer, WeightAveragingCallback)), None)
    if callback is None:
        raise AveragingError(
            "the Trainer has no WeightAveragingCallback; expected Trainer(..., "
            "callbacks=[WeightAveragingCallback()])"
        )
    averager = callback.averager_of(trainer)
    if averager is None:
        raise AveragingError(
            "the Trainer has averaged nothing yet, has been given another model, or another Trainer has trained "
            "with its callback since; call trainer.train() first, and give every Trainer a callback of its own"
        )
    with _swapped_in(trainer, averager, name):
        yield


@contextmanager
def _swapped_in(trainer: Any, averager: WeightAverager, name: str | None = None) -> Iterator[None]:
    """Put the averaged weights into a Trainer's model, with what the Trainer and TRL's trainers need for it."""
    args = trainer.args
    if not trainer.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
        # The evaluation casts the model; inside the swap, this would count as a write to the weights.
        trainer.model.to(torch.float16 if args.fp16_full_eval else torch.bfloat16)
    hands_on = hasattr(trainer, "_last_loaded_step")  # TRL's, which send weights to vLLM once per step
    try:
        if hands_on:
            trainer._last_loaded_step = -1
        with averager.swapped_in(name):
            yield
    finally:
        if hands_on:
            trainer._last_loaded_step = -1


def _evaluating_both(trainer: Trainer) -> Callable[..., dict[str, float]]:
    """Wrap a Trainer's `evaluate`: first the averaged weights, without telling callbacks, then the live ones as
    usual.

    The callback is looked up at each call, so one that was removed or replaced is not evaluated.
    """
    evaluate = trainer.evaluate
    signature = inspect.signature(evaluate)  # subclasses differ: run_qa.py's also takes examples
    parameters = signature.parameters.values()
    takes_prefix = any(each.name == PREFIX or each.kind == each.VAR_KEYWORD for each in parameters)

    @functools.wraps(evaluate)
    def both(*args: Any, **kwargs: Any) -> dict[str, float]:
        callback = next(iter(those_of_kind(trainer, WeightAveragingCallback)), None)
        averager = callback and callback.averager_of(trainer)
        if callback is None or averager is None or not averager.num_averaged:
            return evaluate(*args, **kwargs)
        # A dictionary of datasets calls this again for each one.
        if averager.engine.swap.active or callback.averaged_scores:
            return evaluate(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        prefix = f"{(kwargs | call.arguments).get(PREFIX, 'eval')}_averaged"
        if PREFIX in call.arguments:  # given by name or position
            call.arguments[PREFIX] = prefix
        elif takes_prefix:
            call = signature.bind(*args, **(kwargs | {PREFIX: prefix}))
        with _swapped_in(trainer, averager), _kept_random_state(), _apart(trainer, prefix):
            scores = _renamed(evaluate(*call.args, **call.kwargs), prefix)
            drift = {f"{prefix}_drift": averager.drift()}
        trainer.log(drift)
        callback.averaged_scores = {k: v for k, v in scores.items() if k.startswith(prefix)} | drift
        try:
            return evaluate(*args, **kwargs)
        finally:
            callback.averaged_scores = {}

    vars(both)[SCORES_BOTH] = True
    return both


def _require_shared_output(folder: Path) -> None:
    """Refuse checkpoints in a folder that other machines do not see: each rank writes into them (collective).

    Raises:
        ConfigError: names the machine; on every rank.
    """
    ranks = shared_ranks()
    mark = folder / ranks.gather(f".{secrets.token_hex(8)}")[0]
    with ranks.together(f"output_dir: {folder} could not be written"):
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    try:
        with ranks.together():
            require_shared(mark, "output_dir")
    finally:
        if ranks.is_main:
            mark.unlink(missing_ok=True)


def _require_average_when_chosen_by(args: Any, state: Any, averager: WeightAverager, loader: Any) -> None:
    """Refuse to choose the best model by an averaged score if an evaluation comes before anything is averaged.

    Raises:
        ConfigError: gives the `eval_delay` that fixes it.
    """
    chosen_by = (args.metric_for_best_model or "").removeprefix("eval_")
    first_member = averager.plan().first_step
    if not chosen_by.startswith("averaged_") or averager.num_averaged:
        return
    if args.eval_on_start:
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model} with eval_on_start: nothing is averaged before "
            f"step {first_member}; set eval_on_start=False"
        )
    if args.eval_strategy == "no":
        return
    if args.eval_strategy != "epoch":
        every, unit = state.eval_steps, 1
    elif has_length(loader):
        every = unit = math.ceil(len(loader) / args.gradient_accumulation_steps)
    else:
        return  # the end of the first epoch is unknown
    needed, skips = first_member, ""
    if args.fp16:
        needed = min(first_member + FP16_SKIPS, state.max_steps)
        skips = " (later, as fp16 skips the first steps until its loss scale fits)"
    # The last epoch may end before its rows do.
    first = min(math.ceil(max(args.eval_delay, 1) * unit / every) * every, state.max_steps)
    if first < needed:
        delay = math.floor(1e4 * min(math.ceil(needed / unit), state.max_steps / unit)) / 1e4
        raise ConfigError(
            f"metric_for_best_model={args.metric_for_best_model} at an evaluation after {first:.0f} steps, but "
            f"nothing is averaged before step {first_member}{skips}; set eval_delay={delay:g}, or start averaging "
            "earlier"
        )


def _require_state(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's averages; if there is none, name the latest checkpoint that has one."""
    if is_complete(checkpoint / STATE):
        return checkpoint / STATE
    others = [each.parents[1] for each in checkpoint.parent.glob(f"checkpoint-*/{STATE}/COMPLETE")]
    latest = max(others, key=step_of, default=None)
    advice = (
        f"resume from {latest}, the latest that has some"
        if latest
        else "train from the beginning, or without averaging"
    )
    raise StateError(
        f"{checkpoint} has no averages: it was written without averaging, or the run was killed before they were "
        f"written; {advice}"
    )


@contextmanager
def _apart(trainer: Any, prefix: str) -> Iterator[None]:
    """Keep an evaluation of averaged weights from being mistaken for one of the live weights.

    Callbacks are not told about it, except the progress bar, which then closes the bar of the evaluation. What a
    trainer adds to the log under its own prefix (TRL's ``eval_entropy``) is renamed to an averaged score.
    """
    handler = trainer.callback_handler
    bars = [each for each in handler.callbacks if isinstance(each, ProgressCallback)]
    on_log = handler.on_log

    def heard_by_bars(args: Any, state: Any, control: Any, *rest: Any) -> Any:
        for bar in bars:
            bar.on_evaluate(args, state, control)
        return control

    def logged_as_averaged(args: Any, state: Any, control: Any, logs: dict[str, float]) -> Any:
        _renamed(state.log_history[-1], prefix)
        return on_log(args, state, control, _renamed(logs, prefix))

    handler.on_evaluate, handler.on_log = heard_by_bars, logged_as_averaged
    try:
        yield
    finally:
        del handler.on_evaluate, handler.on_log


def _renamed(scores: dict[str, float], prefix: str) -> dict[str, float]:
    """Rename the scores of averaged weights to averaged names, in place; returns the same dictionary."""
    # compute_metrics may name its scores "eval_f1" itself, and a set of rows may be called "eval".
    live = f"{prefix}_{prefix.removesuffix('averaged')}"
    is_set = f"{live}runtime" in scores
    for name in list(scores):
        if name.startswith(live) and not is_set:
            scores[f"{prefix}_{name.removeprefix(live)}"] = scores.pop(name)
        elif name.startswith("eval_") and not name.startswith(prefix):
            scores[name.replace("eval_", "eval_averaged_", 1)] = scores.pop(name)
    return scores


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore every random generator: a loader draws a seed each time it is iterated."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
