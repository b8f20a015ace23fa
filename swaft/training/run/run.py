"""A run of a recipe: its ranks, its folder, its steps, and how it resumes.

The recipe holds the loop. What lies here is what would drown it: which micro-batches make a step and how much each
counts, the log, evaluation and checkpoints when they are due, signals, and the state that a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from swaft.averaging import Engine, Readout, ReadoutSearch, WeightAverager, attach_engine, save_pretrained
from swaft.storage import sync_tree
from swaft.training.config import AveragingConfig, EvalConfig, flatten, to_yaml
from swaft.training.evaluation.best import BestWeights, Target, watches_weights
from swaft.training.evaluation.evaluate import Evaluation, best_window, mean_evaluations
from swaft.training.launch.accelerator import (
    EngineSettings,
    RunConfig,
    build_accelerator,
    whole_model_loading,
)
from swaft.training.launch.fsdp2 import prepare
from swaft.training.launch.interruption import Interrupted, Interruption
from swaft.training.models.build import ParameterCount, count_parameters
from swaft.training.run.accumulation import step_batches
from swaft.training.run.checkpoints import AVERAGE
from swaft.training.run.ddp_buckets import allow_unused_weights, settle_buckets
from swaft.training.run.engine_state import zero_stage
from swaft.training.run.fingerprint import fingerprint_architecture, fingerprint_frozen, fingerprint_rows
from swaft.training.run.folder import RunFolder
from swaft.training.run.loaders import evaluation_loader, training_loader
from swaft.training.run.meter import Meter
from swaft.training.run.progress import ProgressLog, scores_table, start_trackers
from swaft.training.run.record import RunRecord, Setup
from swaft.training.run.schedule import Schedule, count_optimizer_steps
from swaft.training.run.state import Part, RunState, load_engine_state
from swaft.training.run.step import Position, Step
from swaft.training.run.summary import run_facts, summary

Evaluations = dict[str, Evaluation]
BLENDS = (0.0, 0.3, 0.6, 1.5)
"""What ``averaging.search_blend`` tries besides the average itself."""
"""By kind of weights, ``last`` and ``averaged``."""


class RecipeConfig(RunConfig, Protocol):
    """The sections that the configurations of all recipes have in common."""

    @property
    def averaging(self) -> AveragingConfig: ...  # noqa: D102

    @property
    def eval(self) -> EvalConfig: ...  # noqa: D102


class Run:
    """A run of a recipe, as a context: left by `Interrupted`, it has written a checkpoint.

    Called in this order: `prepare`, `begin`, `steps`, `finish`.

    Args:
        config: of the recipe.
        accelerator: nothing prepared yet.
        folder: of this run.
    """

    def __init__(self, config: RecipeConfig, accelerator: Accelerator, folder: RunFolder):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.position = Position()
        self.total_steps = 0
        """Optimizer steps of the run; known once `prepare` has returned."""
        self._interruption = Interruption()
        self._open = ExitStack()
        self._record: RunRecord | None = None
        self._averager: WeightAverager | None = None
        self._best: BestWeights | None = None
        self.model: Any = None
        """As prepared."""
        self.optimizer: Any = None
        """As prepared."""
        self.meter: Meter
        self._engine: Engine
        self._log: ProgressLog
        self._state: RunState | None = None

    @classmethod
    def start(cls, config: RecipeConfig, engine: EngineSettings) -> Run:
        """Start the engine that the launcher asked for, and claim the run's folder (collective).

        Args:
            config: of the recipe.
            engine: what accelerate is started with, from `swaft.training.checks.start.start_of`.

        Raises:
            ConfigError: the folder holds something else than this run.
            TrainingError: accelerate started something else than the launcher asked for.
        """
        accelerator = build_accelerator(config, engine)
        return cls(config, accelerator, RunFolder.of(config, accelerator))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save where the run was asked to end; leave the signals to whoever had them before."""
        try:
            if isinstance(error, Interrupted) and self._state is not None:
                self._state.save()
                if self._averager is not None:
                    self._averager.close()  # which deletes what it has put on the node's disk
        finally:
            self._open.close()

    def loading(self) -> AbstractContextManager[None]:
        """Context in which a pretrained model is loaded whole, whatever the engine."""
        return whole_model_loading(self.accelerator)

    def prepare(
        self,
        model: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        rows: Dataset,
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        objective: Any,
    ) -> tuple[Any, Any, DataLoader[Any]]:
        """Hand model, optimizer and training rows to the engine, with a checkpoint's state (collective).

        Args:
            model: on the host, the same on every rank.
            optimizer: makes the optimizer of the model, once its weights lie where they will be trained.
            rows: training rows.
            collate: makes a batch of rows.
            objective: loss of a micro-batch.

        Returns:
            Model, optimizer and loader, as ``accelerator.prepare`` returned them.

        Raises:
            ConfigError, StateError: the checkpoint is of another run or engine.
        """
        self._open.enter_context(self._interruption)
        train, accelerator = self.config.train, self.accelerator
        self._parameters: ParameterCount = count_parameters(model)
        architecture, frozen = fingerprint_architecture(model), fingerprint_frozen(model)
        # From here on the weights may live in shards.
        allow_unused_weights(accelerator, model)
        self.model, self.optimizer, loader = prepare(
            accelerator,
            model,
            optimizer,
            training_loader(rows, collate, train, accelerator),
        )
        self.total_steps = count_optimizer_steps(
            micro_batches=len(loader),
            accumulation_steps=train.gradient_accumulation_steps,
            num_train_epochs=train.num_train_epochs,
            max_steps=train.max_steps,
        )
        world_size, batch_size = accelerator.num_processes, train.per_device_train_batch_size
        self._setup = Setup(
            stage=zero_stage(self.model),
            world_size=world_size,
            per_device_train_batch_size=batch_size,
            rows_per_step=batch_size * train.gradient_accumulation_steps * world_size,
            grouped_by=batch_size * world_size if train.group_by_length else None,
            total_steps=self.total_steps,
            rows=len(rows),
            rows_sha256=fingerprint_rows(rows),
            architecture_sha256=architecture,
            frozen_sha256=frozen,
            seed=train.seed,
        )
        if (
            self.folder.checkpoint is not None
        ):  # before an averager is attached: it takes weights as it finds them
            first = [rows[i] for i in range(min(len(rows), batch_size))]
            settle_buckets(accelerator, self.model, objective, collate(first))
            self._record = load_engine_state(
                self.folder.checkpoint, accelerator, self.model, self.optimizer, self._setup
            )
        return self.model, self.optimizer, loader

    def begin(
        self,
        *,
        task: str,
        schedule: Schedule,
        target: Target,
        tokenizer: Any,
        splits: Collection[str],
        averager: WeightAverager | None,
        **parts: Part,
    ) -> None:
        """Resume from the checkpoint, where there is one, and write down what runs (collective).

        Args:
            task: what is learnt, in words.
            schedule: the learning rate, for the log.
            target: the main score, and the one that weights are chosen by.
            tokenizer: saved beside weights.
            splits: names of those that there are rows of.
            averager: None without averaging.
            parts: what else has state, by name; see `Part`.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run; on every rank.
        """
        config, train, folder = self.config, self.config.train, self.folder
        self._averager, self._tokenizer, self._target = averager, tokenizer, target
        self._validates = "validation" in splits
        self._readout = Readout(blend=config.averaging.blend)
        self.meter = Meter(self.accelerator)
        self._engine = averager.engine if averager else attach_engine(self.model, self.optimizer)
        if watches_weights(config.eval):
            self._best = BestWeights(
                config.eval,
                target=target,
                folder=folder.best,
                tokenizer=tokenizer,
                engine=self._engine,
                averager=averager,
            )
        named = {AVERAGE: averager, "best": self._best, "scaler": self.accelerator.scaler, **parts}
        self._state = state = RunState(
            accelerator=self.accelerator,
            model=self.model,
            engine=self._engine,
            meter=self.meter,
            position=self.position,
            parts={name: part for name, part in named.items() if part is not None},
            folder=folder,
            setup=self._setup,
            settings=flatten(config),
            save_total_limit=train.save_total_limit,
        )
        if folder.checkpoint is not None and self._record is not None:
            state.restore(folder.checkpoint, self._record)
        folder.begin(to_yaml(config), self.accelerator, engine=self._engine.name)
        start_trackers(self.accelerator, config)
        set_seed(train.seed, device_specific=True)  # each rank drops out units of its own
        if folder.checkpoint is not None and self._record is not None:
            state.restore_random(folder.checkpoint.path, self._record)
        self._log = ProgressLog(
            self.accelerator,
            folder,
            total_steps=self.total_steps,
            averaging=config.averaging.rule,
            disable_tqdm=train.disable_tqdm,
            done=self.position.step,
        )
        self._log.banner(
            run_facts(
                train,
                self.accelerator,
                task=task,
                num_rows=self._setup.rows,
                num_parameters=self._parameters,
                schedule=schedule,
                averager=averager,
            )
        )
        if folder.checkpoint is not None:
            self._log.resumes(folder.checkpoint.path, self.position.step)

    @property
    def resumed_at(self) -> int:
        """Optimizer steps that had changed the weights when the checkpoint was written; 0 where there is none."""
        return self._record.applied_steps if self._record else 0

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; those an overflow skipped do not count."""
        return self._engine.applied_steps()

    def evaluation_loader(self, rows: Dataset, collate: Callable[[list[Any]], dict[str, Any]]) -> Any:
        """Return a loader over every row, which draws from no generator of training and obeys signals."""
        return evaluation_loader(
            rows,
            collate,
            self.accelerator,
            self._interruption,
            batch_size=self.config.eval.per_device_eval_batch_size,
            num_workers=self.config.train.dataloader_num_workers,
        )

    def steps(self, loader: DataLoader[Any], evaluate: Callable[..., Evaluations]) -> Iterator[Step]:
        """Yield the optimizer steps from where the run stands to its end (collective).

        Between two steps the log, the evaluation and the checkpoint that are due are made.

        Args:
            loader: of training batches, as prepared; one pass over it is an epoch.
            evaluate: as of :meth:`finish`; called for ``validation``.

        Raises:
            Interrupted: the run was asked to end; on every rank, between two steps.
        """
        train, position = self.config.train, self.position
        self.model.train()
        self._evaluate_where_due(evaluate)  # where the run was ended while it did
        batches = step_batches(
            loader, train.gradient_accumulation_steps, epoch=position.epoch, skip=position.batches
        )
        while not self._is_over:
            epoch, batches_read, micro_batches = next(batches)
            step = Step(self, position.step + 1, micro_batches)
            yield step
            self._log.advance()
            position.step, position.epoch, position.batches = step.number, epoch, batches_read
            last = step.number == self.total_steps
            if last or step.number % train.logging_steps == 0:
                record = self.meter.read() | {
                    "grad_norm": step.measured_grad_norm(),
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                }
                if self._averager is not None:
                    record["num_averaged"] = self._averager.num_averaged
                self._log.training(step.number, record)
            every = self.config.eval.eval_steps if self._validates else None
            position.evaluated = last or not every or step.number % every > 0
            self._evaluate_where_due(evaluate)
            if train.save_steps and step.number % train.save_steps == 0 and not self._is_over:
                with self.meter.paused():
                    assert self._state is not None
                    self._state.save()
            self._interruption.check(self.folder.failure)

    def best_window(self, score: Callable[[str], Evaluation]) -> ReadoutSearch | None:
        """Choose the window and the blend of averaged weights that score best on validation rows (collective).

        Args:
            score: scores the weights that are in the model on the rows of a split.

        Returns:
            None where there is nothing to choose: another rule than ``windows`` and no blend to search, or no
            validation rows.
        """
        if not self._validates:
            return None
        with self.meter.paused():
            return best_window(
                self._averager,
                lambda: score("validation"),
                self._target.chosen,
                better=self._target.better,
                blends=BLENDS if self.config.averaging.search_blend else (),
            )

    def finish(
        self,
        evaluate: Callable[..., Evaluations],
        splits: Sequence[str],
        *,
        window: ReadoutSearch | None = None,
        means: Mapping[str, Sequence[str]] | None = None,
        write_outputs: Callable[[dict[str, Evaluations]], None] = lambda found: None,
    ) -> None:
        """Evaluate the last and the averaged weights on every split, and save both (collective).

        Args:
            evaluate: scores the weights on the rows of a split; the second argument says which average.
            splits: names of all that are evaluated.
            window: what to average, where the rule leaves a choice.
            means: splits whose mean scores are reported as well, by the name of the mean.
            write_outputs: writes into the folder what else comes of the evaluations; called before summary.json
                says that the run has ended.
        """
        folder, averager, log = self.folder, self._averager, self._log
        seconds = self.meter.seconds
        if self.position.stopped:
            log.stopped_early(self.position.step)
        if window:
            log.window(window)
        readout = window.best.readout if window else self._readout
        found = {split: evaluate(split, readout) for split in splits}
        found |= mean_evaluations(found, means or {})
        scores = {
            split: {kind: each.scores for kind, each in kinds.items()} for split, kinds in found.items()
        }
        for split, kinds in scores.items():
            log.evaluation(self.position.step, split, kinds)
        saved = self._save_weights(readout)
        if self._best is not None:
            self._best.observe(self.position.step, scores["validation"], readout)
        write_outputs(found)
        self._engine.ranks.raise_together(folder.failure)
        content = summary(
            found,
            steps=self.position.step,
            applied_steps=self.applied_steps,
            seconds=seconds,
            stopped_early=self.position.stopped,
            metric_name=self._target.score,
            averager=averager,
            window=window,
            best=self._best and self._best.found,
        )
        folder.write_json("summary.json", content)
        self._engine.ranks.raise_together(folder.failure)
        if folder.best.exists():
            saved["best"] = folder.best
        log.saved(saved)
        if scores:
            log.table(scores_table(scores, seconds=seconds))
        folder.release()
        log.close()

    @property
    def _is_over(self) -> bool:
        return self.position.stopped or self.position.step == self.total_steps

    def _evaluate_where_due(self, evaluate: Callable[..., Evaluations]) -> None:
        if self.position.evaluated:
            return
        with self.meter.paused():
            found = evaluate("validation", self._readout)
            scores = {kind: each.scores for kind, each in found.items()}
            self._log.evaluation(self.position.step, "validation", scores)
            if self._best is not None:
                self.position.stopped = self._best.observe(self.position.step, scores, self._readout)
        self.position.evaluated = True

    def _save_weights(self, readout: Readout | None) -> dict[str, Any]:
        """Write both kinds of weights with the tokenizer; return where they are."""
        folder, ranks = self.folder, self._engine.ranks
        saved = {"last": folder.final}
        save_pretrained(self._engine, folder.final)
        if self._averager:
            saved["averaged"] = folder.final_averaged
            self._averager.save_pretrained(folder.final_averaged, readout)
        with ranks.together(f"the tokenizer could not be written to {folder.path}"):
            if folder.is_main:
                for path in saved.values():
                    self._tokenizer.save_pretrained(path)
                    sync_tree(path)
        return saved
