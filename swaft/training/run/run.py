"""A run of a recipe: its ranks, its folder, its steps, and how it resumes.

The recipe holds the loop. What lies here is what would drown it: which micro-batches make a step and how much each
counts, the log, evaluation and checkpoints when they are due, signals, and the state that a checkpoint holds.
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
from swaft.storage import sync_tree
from swaft.training.config import RecipeConfig, load_config, to_yaml
from swaft.training.evaluation.best import BestWeights, Target, watches_weights
from swaft.training.evaluation.evaluate import Evaluation, Scores, best_window, mean_evaluations
from swaft.training.launch.accelerator import (
    EngineSettings,
    build_accelerator,
    whole_model_loading,
)
from swaft.training.launch.failure import run_and_report
from swaft.training.launch.fsdp2 import prepare
from swaft.training.launch.interruption import Interrupted, InterruptibleLoader, Interruption
from swaft.training.models.build import count_parameters
from swaft.training.run.batches import Collate, loader_of, step_batches, training_loader
from swaft.training.run.checkpoints import AVERAGE
from swaft.training.run.ddp_buckets import allow_unused_weights, settle_buckets
from swaft.training.run.engine_state import zero_stage
from swaft.training.run.folder import RunFolder
from swaft.training.run.meter import Meter
from swaft.training.run.progress import ProgressLog, run_facts, setup_logging, start_trackers, summary
from swaft.training.run.record import (
    RunRecord,
    Setup,
    fingerprint_architecture,
    fingerprint_frozen,
    fingerprint_rows,
)
from swaft.training.run.schedule import count_optimizer_steps
from swaft.training.run.state import Part, RunState, load_engine_state
from swaft.training.run.step import Position, Step

Evaluations = dict[str, Evaluation]
"""By kind of weights, ``last`` and ``averaged``."""
BLENDS = (0.0, 0.3, 0.6, 1.5)
"""What ``averaging.search_blend`` tries besides the average itself."""


def run_recipe(train: Callable[[Any], None], config: type, argv: Sequence[str] | None = None) -> int:
    """Read a recipe's settings, train, and return the exit code.

    Args:
        train: of the recipe.
        config: class of its settings.
        argv: arguments; None: the command line's.
    """
    setup_logging()
    return run_and_report(lambda: train(load_config(config, sys.argv[1:] if argv is None else argv)))


class Run:
    """A run of a recipe, as a context: left by `Interrupted`, it has written a checkpoint.

    Called in this order: `prepare`, `begin`, `steps`, `finish`.

    Args:
        config: of the recipe.
        accelerator: nothing prepared yet.
        folder: of this run.
    """

    model: Any
    """As prepared."""
    optimizer: Any
    """As prepared."""
    meter: Meter
    """Sums of the log, and the time in training steps; known once `begin` has been called."""
    engine: Engine
    """Of the model; known once `begin` has been called."""
    averager: WeightAverager | None = None
    """None without averaging, and until `begin`."""
    best: BestWeights | None = None
    """The weights that scored best, where they are followed."""
    target: Target
    """The main score, and the one that weights are chosen by."""
    total_steps: int = 0
    """Optimizer steps of the run; known once `prepare` has returned."""

    def __init__(self, config: RecipeConfig, accelerator: Accelerator, folder: RunFolder):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.position = Position()
        self.readout = Readout(blend=config.averaging.blend)
        self._interruption, self._open = Interruption(), ExitStack()
        self._record: RunRecord | None = None
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Save where the run was asked to end; leave the signals to whoever had them before."""
        try:
            if isinstance(error, Interrupted) and self._state is not None:
                self._state.save()
                if self.averager is not None:
                    self.averager.close()  # which deletes what it has put on the node's disk
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
        collate: Collate,
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
        train, accelerator, world_size = self.config.train, self.accelerator, self.accelerator.num_processes
        self.num_parameters, self.num_rows = count_parameters(model), len(rows)
        architecture, frozen = fingerprint_architecture(model), fingerprint_frozen(model)
        # From here on the weights may live in shards.
        allow_unused_weights(accelerator, model)
        loader = training_loader(rows, collate, train, world_size=world_size)
        self.model, self.optimizer, loader = prepare(accelerator, model, optimizer, loader)
        self.total_steps = count_optimizer_steps(train, len(loader))
        batch_size = train.per_device_train_batch_size
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
        checkpoint = self.folder.checkpoint
        if checkpoint is not None:  # before an averager is attached: it takes weights as it finds them
            first = [rows[i] for i in range(min(len(rows), batch_size))]
            settle_buckets(accelerator, self.model, objective, collate(first))
            self._record = load_engine_state(checkpoint, accelerator, self.model, self.optimizer, self._setup)
        return self.model, self.optimizer, loader

    def begin(
        self,
        *,
        task: str,
        schedule: Callable[[int], float],
        target: Target,
        tokenizer: Any,
        splits: Collection[str],
        averager: WeightAverager | None,
        **parts: Part,
    ) -> None:
        """Resume from the checkpoint, where there is one, and write down what runs (collective).

        Args:
            task: what is learnt, in words.
            schedule: the learning rate; its name, or what `str` makes of it, is logged.
            target: the main score, and the one that weights are chosen by.
            tokenizer: saved beside weights.
            splits: names of those that there are rows of.
            averager: None without averaging.
            parts: what else has state, by name; see `Part`. What has none may be passed too.

        Raises:
            ConfigError, StateError: the checkpoint does not fit this run; on every rank.
        """
        config, folder, accelerator = self.config, self.folder, self.accelerator
        self.averager, self.target, self._tokenizer = averager, target, tokenizer
        self._validates = "validation" in splits
        self.meter = Meter(accelerator)
        self.engine = averager.engine if averager else attach_engine(self.model, self.optimizer)
        if watches_weights(config.eval):
            self.best = BestWeights(
                config.eval,
                target=target,
                folder=folder.best,
                tokenizer=tokenizer,
                engine=self.engine,
                averager=averager,
            )
        named = {AVERAGE: averager, "best": self.best, "scaler": accelerator.scaler, **parts}
        stateful = {
            name: part
            for name, part in named.items()
            if hasattr(part, "save_state") or hasattr(part, "state_dict")
        }
        self._state = RunState(self, self._setup, stateful)
        checkpoint, record = folder.checkpoint, self._record
        if checkpoint is not None and record is not None:
            self._state.restore(checkpoint, record)
        folder.begin(to_yaml(config), accelerator, engine=self.engine.name)
        start_trackers(accelerator, config)
        set_seed(config.train.seed, device_specific=True)  # each rank drops out units of its own
        if checkpoint is not None and record is not None:
            self._state.restore_random(checkpoint.path, record)
        self._log = ProgressLog(
            accelerator,
            folder,
            total_steps=self.total_steps,
            averaging=config.averaging.rule,
            disable_tqdm=config.train.disable_tqdm,
            done=self.position.step,
        )
        self._log.banner(run_facts(self, task=task, schedule=schedule))

    @property
    def averaging_options(self) -> dict[str, Any]:
        """What an averager has to know besides model and rule: where the run resumes, and how averages are kept."""
        section = self.config.averaging
        return {
            "first_step": self._record.applied_steps if self._record else 0,
            "precision": section.precision,
            "threads": section.threads,
            "spill_dir": section.spill_dir,
        }

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that changed the weights; those an overflow skipped do not count."""
        return self.engine.applied_steps()

    def evaluation_loaders(self, splits: Mapping[str, Dataset], collate: Collate) -> dict[str, Any]:
        """Return loaders over every row of each split but ``train``.

        They draw from no generator of training, and obey signals between two batches.
        """
        batch_size = self.config.eval.per_device_eval_batch_size
        workers = self.config.train.dataloader_num_workers
        loaders = {
            name: loader_of(rows, collate, batch_size=batch_size, num_workers=workers)
            for name, rows in splits.items()
            if name != "train"
        }
        return {
            name: InterruptibleLoader(self.accelerator.prepare_data_loader(loader), self._interruption)
            for name, loader in loaders.items()
        }

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
                if self.averager is not None:
                    record["num_averaged"] = self.averager.num_averaged
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
                self.averager,
                lambda: score("validation"),
                self.target.chosen,
                better=self.target.better,
                blends=BLENDS if self.config.averaging.search_blend else (),
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
        """Evaluate the last and the averaged weights on every split, and save both (collective).

        Args:
            evaluate: scores the weights on the rows of a split; the second argument says which average.
            splits: names of all that are evaluated.
            window: what to average, where the rule leaves a choice.
            means: splits whose mean scores are reported as well, by the name of the mean.
            write_outputs: writes into the folder what else comes of the evaluations; called before summary.json
                says that the run has ended.
        """
        folder, step, seconds, ranks = self.folder, self.position.step, self.meter.seconds, self.engine.ranks
        if self.position.stopped:
            self._log.stopped_early(step)
        if window:
            self._log.window(window)
            self.readout = window.best.readout
        found = {split: evaluate(split, self.readout) for split in splits}
        found |= mean_evaluations(found, means or {})
        scores = {split: _scores(kinds) for split, kinds in found.items()}
        for split, kinds in scores.items():
            self._log_scores(split, kinds)
        saved = self._save_weights()
        if self.best is not None:
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
    def _is_over(self) -> bool:
        return self.position.stopped or self.position.step == self.total_steps

    def _evaluate_where_due(self, evaluate: Callable[..., Evaluations]) -> None:
        if self.position.evaluated:
            return
        with self.meter.paused():
            scores = _scores(evaluate("validation", self.readout))
            self._log_scores("validation", scores)
            if self.best is not None:
                self.position.stopped = self.best.observe(self.position.step, scores, self.readout)
        self.position.evaluated = True

    def _log_scores(self, split: str, scores: Mapping[str, Scores]) -> None:
        """Log scores, those of averaged weights on validation rows with how far they are from the last ones."""
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
        with self.engine.ranks.together(f"the tokenizer could not be written to {folder.path}"):
            for path in saved.values() if folder.is_main else ():
                self._tokenizer.save_pretrained(path)
                sync_tree(path)
        return saved


def _scores(kinds: Evaluations) -> dict[str, Scores]:
    return {kind: each.scores for kind, each in kinds.items()}
