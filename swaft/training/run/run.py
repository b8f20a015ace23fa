"""A run of a recipe: its ranks, its folder, its steps, and how it resumes.

The recipe has the loop. This module has what would clutter it: which micro-batches make a step and how much each
counts, the log, evaluation and checkpoints when they are due, signals, and the state in a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from swaft.averaging import Engine, Readout, ReadoutSearch, WeightAverager, attach_engine, save_pretrained
from swaft.averaging.rules import WindowsPlan
from swaft.averaging.search import most_evaluations, search_windows
from swaft.noise.objectives import Resumable
from swaft.storage import sync_tree
from swaft.training.checks import Prepared
from swaft.training.config import RecipeConfig, load_config, to_yaml
from swaft.training.data.loaders import Collate, loader_of, training_loader
from swaft.training.evaluation.best import BestWeights
from swaft.training.evaluation.evaluate import Evaluation, Scores, mean_evaluations, without_row_id
from swaft.training.launch.accelerator import whole_model_loading
from swaft.training.launch.ddp import allow_unused_weights, settle_buckets
from swaft.training.launch.failure import run_and_report
from swaft.training.launch.fsdp2 import prepare
from swaft.training.launch.interruption import Interrupted, InterruptibleLoader, Interruption
from swaft.training.models.build import (
    count_epoch_steps,
    count_optimizer_steps,
    count_parameters,
    rate_factors,
    require_called,
    require_own_parameters,
)
from swaft.training.models.pretrained import Preprocessing, processor_files
from swaft.training.run.checkpoints import AVERAGE, find_checkpoints
from swaft.training.run.engine_state import zero_stage
from swaft.training.run.folder import RunFolder
from swaft.training.run.progress import ProgressLog, setup_logging, start_trackers, summary
from swaft.training.run.record import (
    Setup,
    fingerprint_architecture,
    fingerprint_frozen,
    fingerprint_rows,
    layout_of,
)
from swaft.training.run.state import RunState
from swaft.training.run.step import Meter, Position, Step, step_batches

Evaluations = dict[str, Evaluation]
"""Evaluations by kind of weights, ``last`` and ``averaged``."""
BLENDS = (0.0, 0.3, 0.6, 1.5)
"""The blends that ``averaging.search_blend`` tries besides the average itself."""


def run_recipe(train: Callable[[Any], None], config: type, argv: Sequence[str] | None = None) -> int:
    """Read a recipe's settings, train, and return the exit code.

    Args:
        train: the recipe's ``train``.
        config: class of its settings.
        argv: arguments; None: those of the command line.
    """
    setup_logging()
    return run_and_report(lambda: train(load_config(config, sys.argv[1:] if argv is None else argv)))


class Run:
    """A run of a recipe, as a context: if `Interrupted` ends it, it writes a checkpoint.

    Call in this order: `prepare`, `begin`, `steps`, `finish`.

    Args:
        config: the recipe's configuration.
        accelerator: from `build_accelerator`; nothing prepared yet.

    Raises:
        ConfigError, StateError: the run folder holds something else, or no intact checkpoint to resume from.
    """

    model: Any
    """The prepared model."""
    optimizer: Any
    """The prepared optimizer."""
    objective: Any
    """Loss of a micro-batch; known once `prepare` has been called, as are the two above."""
    total_steps: int
    """Optimizer steps of the run; known once `prepare` has returned."""
    engine: Engine
    """Where the weights of the model live; known once `begin` has been called."""
    meter: Meter
    """Sums of the log, and the time in training steps; known once `begin` has been called."""
    averager: WeightAverager | None = None
    """None without averaging, and until `begin`."""
    best: BestWeights | None = None
    """The weights that scored best, if they are tracked."""

    def __init__(self, config: RecipeConfig, accelerator: Accelerator):
        self.config, self.accelerator, train = config, accelerator, config.train
        yaml, resume = to_yaml(config), train.resume_from_checkpoint
        self.folder = RunFolder.create(train.output_dir, accelerator, resume=resume, config_yaml=yaml)
        self.position = Position()
        self.readout = Readout(blend=config.averaging.blend)
        self._interruption, self._open = Interruption(), ExitStack()
        self._at_stop = dict[str, Evaluations]()  # the evaluation that stopped the run early

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Save if the run was asked to end, or note that Ctrl-C left a checkpoint; restore the signal handlers."""
        with self._open:
            if isinstance(error, Interrupted):
                self._state.save()
                if self.averager is not None:
                    self.averager.close()  # deletes what it has put on the node's disk
            resumes = self.config.train.resume_from_checkpoint != "none"
            if isinstance(error, KeyboardInterrupt) and resumes and find_checkpoints(self.folder.path):
                error.add_note("when started again, the run resumes from its newest checkpoint")

    def loading(self) -> AbstractContextManager[None]:
        """Context in which a pretrained model is loaded whole, whatever the engine."""
        return whole_model_loading(self.accelerator)

    def prepare(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        rows: Dataset,
        collate: Collate,
        *,
        objective: Any,
    ) -> tuple[Any, Any, DataLoader[Any]]:
        """Hand model, optimizer and training rows to the engine, with a checkpoint's state (collective).

        Args:
            model: on the host, the same on every rank.
            optimizer: makes the optimizer from the model (under FSDP2, once its weights are sharded). Parameter
                groups with different rates keep their ratios to ``train.learning_rate``.
            rows: training rows.
            collate: makes a batch from rows.
            objective: loss of a micro-batch.

        Returns:
            Model, optimizer and loader, as returned by ``accelerator.prepare``.

        Raises:
            ConfigError, StateError: the checkpoint is from another run or engine, or the optimizer has parameters
                that are not the model's.
        """
        self._open.enter_context(self._interruption)
        self.objective = objective
        train, accelerator, world_size = self.config.train, self.accelerator, self.accelerator.num_processes
        self.num_parameters, self.num_rows = count_parameters(model), len(rows)
        architecture, frozen = fingerprint_architecture(model), fingerprint_frozen(model)
        # From here on the weights may be sharded.
        allow_unused_weights(accelerator, model)
        loader = training_loader(rows, collate, train, world_size=world_size, device=accelerator.device)

        def build(model: nn.Module) -> torch.optim.Optimizer:
            built = optimizer(model)
            require_own_parameters(built, model)
            return built

        self.model, self.optimizer, loader = prepare(accelerator, model, build, loader)
        self._rate_factors = rate_factors(self.optimizer, train.learning_rate)
        self.total_steps = count_optimizer_steps(train, len(loader))
        self.steps_per_epoch = count_epoch_steps(train, len(loader))
        setup = Setup(
            **layout_of(train, world_size=world_size, stage=zero_stage(self.model)),
            total_steps=self.total_steps,
            rows=len(rows),
            rows_sha256=fingerprint_rows(rows),
            architecture_sha256=architecture,
            frozen_sha256=frozen,
        )
        self._state = RunState(self, setup)
        # Before an averager is attached: it starts from the current weights.
        if self.folder.checkpoint is not None:
            first = [rows[i] for i in range(min(len(rows), train.per_device_train_batch_size))]
            settle_buckets(accelerator, self.model, objective, without_row_id(collate(first)))
            self._state.load_engine(self.folder.checkpoint)
        return self.model, self.optimizer, loader

    def begin(
        self,
        ready: Prepared,
        tokenizer: Any,
        splits: Collection[str],
        *,
        schedule: Callable[[int], float],
        averager: WeightAverager | None,
        **parts: Any,
    ) -> None:
        """Resume from the checkpoint, if there is one, and write down what is run (collective).

        Args:
            ready: what is learnt, in words, and which score decides between weights.
            tokenizer: saved with the weights.
            splits: names of the splits that have rows.
            schedule: the learning rate; its name, or its `str`, is logged.
            averager: None without averaging.
            parts: other objects with state, by name: plain JSON values, the same on every rank (`state_dict`,
                `load_state_dict`), or files in a folder that all ranks write and read together (`save_state`,
                `load_state`), which may be left out. Files win if an object offers both. Objects without state may
                be passed too.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run, or a part's state is not plain values; on
                every rank.
        """
        config, folder, accelerator = self.config, self.folder, self.accelerator
        self.averager, self.target = averager, ready.target
        self.meter, self._validates = Meter(accelerator), "validation" in splits
        self.engine = averager.engine if averager else attach_engine(self.model, self.optimizer)
        described = getattr(self.engine.module, "config", None)
        others = processor_files(config.model, described) if accelerator.is_main_process else ()
        self._tokenizer = Preprocessing(tokenizer, others)
        if config.eval.judges_weights:
            self.best = BestWeights(
                config.eval,
                target=ready.target,
                folder=folder.best,
                tokenizer=self._tokenizer,
                engine=self.engine,
                averager=averager,
            )
        named = {AVERAGE: averager, "best": self.best, "scaler": accelerator.scaler, **parts}
        self._state.restore(named)
        folder.begin(to_yaml(config), accelerator, engine=self.engine.name)
        start_trackers(accelerator, config)
        set_seed(config.train.seed, device_specific=True)  # each rank has its own dropout masks
        self._state.restore_random()
        self._log = ProgressLog(self)
        self._log.banner(task=ready.description, schedule=schedule)

    @property
    def averaging_options(self) -> dict[str, Any]:
        """Arguments of an averager besides model and rule: where the run resumes, and how averages are kept."""
        section = self.config.averaging
        return {
            "first_step": self._state.first_step,
            "precision": section.precision,
            "threads": section.threads,
            "spill_dir": section.spill_dir,
        }

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; steps skipped for overflow do not count."""
        return self.engine.applied_steps()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step; groups made with different rates keep their ratios to the setting."""
        for group, factor in zip(self.optimizer.param_groups, self._rate_factors, strict=True):
            group["lr"] = rate * factor

    def evaluation_loaders(self, splits: Mapping[str, Dataset], collate: Collate) -> dict[str, Any]:
        """Return loaders over every row of each split except ``train``.

        They do not use training's random generators, and react to signals between batches.
        """
        size, workers = self.config.eval.per_device_eval_batch_size, self.config.train.dataloader_num_workers
        device = self.accelerator.device

        def loader(rows: Dataset) -> InterruptibleLoader:
            made = loader_of(rows, collate, batch_size=size, num_workers=workers, device=device)
            return InterruptibleLoader(self.accelerator.prepare_data_loader(made), self._interruption)

        return {name: loader(rows) for name, rows in splits.items() if name != "train"}

    def steps(self, loader: DataLoader[Any], evaluate: Callable[..., Evaluations]) -> Iterator[Step]:
        """Yield the optimizer steps from the current position to the end of the run (collective).

        Between steps, write the log, evaluate and save checkpoints when they are due.

        Args:
            loader: prepared loader of training batches; one pass over it is an epoch.
            evaluate: as for :meth:`finish`; called for ``validation``.

        Raises:
            Interrupted: the run was asked to end; on every rank, between two steps.
            ConfigError: the first step has not called the noise objective that `prepare` was given.
        """
        train, position = self.config.train, self.position
        self.model.train()
        self._evaluate_where_due(evaluate)  # if the run was interrupted during an evaluation
        batches = step_batches(
            loader, train.gradient_accumulation_steps, epoch=position.epoch, skip=position.batches
        )
        while not self._is_over:
            epoch, batches_read, micro_batches = next(batches)
            step = Step(self, position.step + 1, micro_batches)
            yield step
            require_called(self.objective)
            self._log.advance()
            position.step, position.epoch, position.batches = step.number, epoch, batches_read
            last = step.number == self.total_steps
            if last or step.number % train.logging_steps == 0:
                self._log_training(step)
            every = self.config.eval.eval_steps if self._validates else None
            position.evaluated = last or not every or step.number % every > 0
            self._evaluate_where_due(evaluate)
            if train.save_steps and step.number % train.save_steps == 0 and not self._is_over:
                with self.meter.paused():
                    self._state.save()
            self._interruption.check(self.folder.failure)

    def best_window(self, score: Callable[[str], Evaluation]) -> ReadoutSearch | None:
        """Choose the window and the blend of averaged weights that score best on validation rows (collective).

        Args:
            score: scores the model's current weights on the rows of a split.

        Returns:
            None if there is nothing to choose: a rule other than ``windows`` and no blend to search, or no
            validation rows.
        """
        averager, target, choices = self.averager, self.target, self._choices
        if averager is None or not self._validates or not choices:
            return None
        blends = BLENDS if "blend" in choices else ()
        self._log.searching(choices, evaluations=most_evaluations(averager, blends=blends))
        with self.meter.paused():
            return search_windows(
                averager,
                lambda: score("validation").scores[target.chosen],
                better=target.better,
                blends=blends,
            )

    def finish(
        self,
        evaluate: Callable[..., Evaluations],
        splits: Collection[str],
        *,
        window: ReadoutSearch | None = None,
        means: Mapping[str, Sequence[str]] | None = None,
        write_outputs: Callable[[dict[str, Evaluations]], None] = lambda found: None,
    ) -> None:
        """Save the last and the averaged weights, and evaluate both on every split (collective).

        Args:
            evaluate: scores the weights on the rows of a split; the second argument says which average.
            splits: names of all splits to evaluate.
            window: what to average, if the rule offers a choice.
            means: splits whose mean scores are reported as well, by the name of the mean.
            write_outputs: writes other outputs of the evaluations to the folder; called before summary.json
                says that the run has ended.
        """
        folder, step, seconds, ranks = self.folder, self.position.step, self.meter.seconds, self.engine.ranks
        if isinstance(self.objective, Resumable):  # a copied recipe may have an objective of its own
            self.objective.finish()
        if self.position.stopped:
            self._log.stopped_early()
        if window:
            self._log.window(window, self._choices)
            self.readout = window.best.readout
        saved = self._save_weights()  # before the evaluation, which may need more memory than training did
        known = {} if window else self._at_stop
        found = {split: known.get(split) or evaluate(split, self.readout) for split in splits}
        found |= mean_evaluations(found, means or {})
        scores = {split: _scores(kinds) for split, kinds in found.items()}
        for split, kinds in scores.items():
            if split not in known:
                self._log_scores(split, kinds)
        if self.best is not None and not known:
            self.best.observe(step, scores["validation"], self.readout)
        write_outputs(found)
        ranks.raise_together(folder.failure)
        folder.write_json("summary.json", summary(self, found, seconds=seconds, window=window))
        ranks.raise_together(folder.failure)
        if folder.best.exists():
            saved["best"] = folder.best
        self._log.end(saved, scores, seconds=seconds)
        folder.release()
        self._log.close()

    @property
    def _choices(self) -> list[str]:
        """What is chosen after training: ``window``, ``blend``, both or nothing."""
        searches = self.config.averaging.search_blend
        windows = self.averager is not None and isinstance(self.averager.plan(), WindowsPlan)
        return ["window"] * windows + ["blend"] * searches

    @property
    def _is_over(self) -> bool:
        return self.position.stopped or self.position.step == self.total_steps

    def _log_training(self, step: Step) -> None:
        record = self.meter.read() | {
            "grad_norm": step.measured_grad_norm(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if self.averager is not None:
            record["num_averaged"] = self.averager.num_averaged
        self._log.training(step.number, record)

    def _evaluate_where_due(self, evaluate: Callable[..., Evaluations]) -> None:
        if self.position.evaluated:
            return
        with self.meter.paused():
            found = evaluate("validation", self.readout)
            scores = _scores(found)
            self._log_scores("validation", scores)
            if self.best is not None:
                self.position.stopped = self.best.observe(self.position.step, scores, self.readout)
            if self.position.stopped:
                self._at_stop = {"validation": found}
        self.position.evaluated = True

    def _log_scores(self, split: str, scores: Mapping[str, Scores]) -> None:
        """Log scores; for averaged weights on validation rows, also their distance from the last weights."""
        if self.averager is not None and split == "validation" and "averaged" in scores:
            drift = {"drift": self.averager.drift(self.readout)}
            scores = {**scores, "averaged": scores["averaged"] | drift}
        self._log.evaluation(self.position.step, split, scores)

    def _save_weights(self) -> dict[str, Any]:
        """Write both kinds of weights with the tokenizer; return where they are."""
        folder, saved = self.folder, {"last": self.folder.final}
        save_pretrained(self.engine, folder.final)
        if self.averager:
            saved["averaged"] = folder.final_averaged
            self.averager.save_pretrained(folder.final_averaged, self.readout)
        fault = f"the tokenizer could not be written to {folder.path}"
        with self.engine.ranks.together(fault, patiently=True):
            if folder.is_main:
                for path in saved.values():
                    self._tokenizer.save_pretrained(path)
                    sync_tree(path)
        return saved


def _scores(kinds: Evaluations) -> dict[str, Scores]:
    return {kind: each.scores for kind, each in kinds.items()}
