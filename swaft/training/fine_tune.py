"""What every recipe does once it has its data, its model and its metric: train, average, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

import swaft
from swaft.averaging import attach_engine, save_pretrained
from swaft.averaging.rules import Rule
from swaft.config import AveragingConfig, EvalConfig, flatten, to_yaml
from swaft.storage import sync_tree
from swaft.training.best import BestWeights, Target, choose_target, watches_weights
from swaft.training.build import build_optimizer, count_parameters
from swaft.training.evaluate import (
    Evaluation,
    best_window,
    evaluate_last_and_averaged,
    mean_evaluations,
)
from swaft.training.launch.accelerator import RunConfig
from swaft.training.launch.fsdp2 import prepare
from swaft.training.launch.interruption import Interrupted, Interruption
from swaft.training.loaders import evaluation_loader, training_loader
from swaft.training.loop import TrainingResult, train
from swaft.training.meter import Meter
from swaft.training.progress import ProgressLog, scores_table, start_trackers
from swaft.training.run.ddp_buckets import settle_buckets
from swaft.training.run.engine_state import zero_stage
from swaft.training.run.fingerprint import fingerprint_architecture, fingerprint_frozen, fingerprint_rows
from swaft.training.run.folder import RunFolder
from swaft.training.run.position import Position
from swaft.training.run.record import Setup
from swaft.training.run.state import RunState, load_engine_state
from swaft.training.schedule import Schedule, build_schedule, count_optimizer_steps
from swaft.training.summary import run_facts, summary

Evaluate = Callable[[nn.Module, DataLoader[Any], str], Evaluation]
"""Evaluates the model as prepared on a loader over every row of the split of that name (collective)."""

Evaluations = dict[str, dict[str, Evaluation]]
"""By split and kind of weights, ``last`` and ``averaged``."""


class FineTuningConfig(RunConfig, Protocol):
    """The sections that the configurations of all recipes have in common."""

    @property
    def averaging(self) -> AveragingConfig: ...  # noqa: D102

    @property
    def eval(self) -> EvalConfig: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a recipe brings to be trained: its model, its data and its metric."""

    task: str
    """What is learnt, in words, for the banner."""
    model: nn.Module
    """On the host, as the objective prepared it; the same on every rank."""
    tokenizer: Any
    """Saved beside the weights."""
    objective: Any
    """Loss of a micro-batch, from `build_objective`."""
    rule: Rule | None
    """What to average; None: nothing."""
    datasets: Mapping[str, Dataset]
    """Rows by split, with ``input_ids``; all but ``train`` are evaluated, ``validation`` also while training."""
    collate: Callable[[list[Any]], dict[str, Any]]
    """Makes a batch of rows."""
    evaluate: Evaluate
    """Scores of the model on the rows of a split."""
    target: Target
    """The main score, which the summary names, and what others the settings may choose weights by."""
    means: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Splits whose mean scores are reported as well, by the name of the mean."""
    write_outputs: Callable[[Evaluations], None] = lambda found: None
    """Writes into the folder what else comes of the final evaluations, which are the same on every rank; called
    before summary.json says that the run has come to its end."""


def fine_tune(config: FineTuningConfig, accelerator: Accelerator, folder: RunFolder, job: Job) -> None:
    """Fine-tune, evaluate the last and the averaged weights, and save both (collective).

    Goes on from ``folder.checkpoint``, where there is one, as if the run had never ended.

    Leaves in the run folder what the run was (config.yaml, command.txt, env.json), metrics.jsonl, the weights
    (final/, final-averaged/, and best/ where that is asked for) with the tokenizer, and summary.json.

    Args:
        config: sections ``train``, ``averaging``, ``eval`` and ``track``.
        accelerator: nothing prepared yet.
        folder: of this run.
        job: what is trained.

    Raises:
        Interrupted: the run was asked to end, and has left a checkpoint.
        ConfigError: the weights are to be chosen by a score, or on rows, that there are not.
    """
    target = choose_target(config.eval, job.target, job.datasets)
    with Interruption() as interruption:
        run = start_run(config, accelerator, folder, job, target=target, interruption=interruption)
        try:
            run.finish(run.train(config), job)
        except Interrupted:
            run.state.save()
            if run.state.averager is not None:
                run.state.averager.close()  # which deletes what it has put on the node's disk
            raise


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run whose engine has been started."""

    state: RunState
    """All that changes as it goes on."""
    optimizer: Any
    """As prepared."""
    loader: DataLoader[Any]
    """Training batches, as prepared."""
    schedule: Schedule
    """Learning rate by step."""
    evaluations: Mapping[str, Callable[[], Evaluation]]
    """Evaluates the weights that are in the model, by split (collective)."""
    target: Target
    """The score that chooses between weights."""
    progress: ProgressLog
    """Is told how it goes."""
    interruption: Interruption
    """Whether the run was asked to end."""

    def train(self, config: FineTuningConfig) -> TrainingResult:
        """Train from where the run stands to its end (collective).

        Raises:
            Interrupted: the run was asked to end; it can go on from `state`.
        """
        state = self.state

        def validate(step: int) -> bool:
            found = evaluate_last_and_averaged(self.evaluations["validation"], state.averager)
            scores = {kind: evaluation.scores for kind, evaluation in found.items()}
            self.progress.evaluation(step, "validation", scores)
            return state.best is not None and state.best.observe(step, scores)

        return train(
            accelerator=state.accelerator,
            model=state.model,
            optimizer=self.optimizer,
            loader=self.loader,
            objective=state.objective,
            engine=state.engine,
            schedule=self.schedule,
            settings=config.train,
            progress=self.progress,
            meter=state.meter,
            position=state.position,
            averager=state.averager,
            validate=validate if "validation" in self.evaluations else None,
            eval_steps=config.eval.eval_steps,
            save=state.save,
            check=lambda: self.interruption.check(state.folder.failure),
        )

    def finish(self, result: TrainingResult, job: Job) -> None:
        """Evaluate the last weights and the averaged ones, and keep both (collective)."""
        state, progress, folder, averager = self.state, self.progress, self.state.folder, self.state.averager
        if result.stopped_early:
            progress.stopped_early(result.steps)
        window = best_window(
            averager, self.evaluations.get("validation"), self.target.score, better=self.target.better
        )
        if window:
            progress.window(window)
        selection: dict[str, Any] = {"start": window.best.start, "end": window.best.end} if window else {}
        found = {
            name: evaluate_last_and_averaged(once, averager, **selection)
            for name, once in self.evaluations.items()
        }
        found |= mean_evaluations(found, job.means)
        scores = {
            name: {kind: evaluation.scores for kind, evaluation in kinds.items()}
            for name, kinds in found.items()
        }
        for name, kinds in scores.items():
            progress.evaluation(result.steps, name, kinds)
        saved = {"last": folder.final}
        save_pretrained(state.engine, folder.final)
        if averager:
            saved["averaged"] = folder.final_averaged
            averager.save_pretrained(folder.final_averaged, **selection)
        with state.engine.ranks.together(f"the tokenizer could not be written to {folder.path}"):
            if folder.is_main:
                for path in saved.values():
                    job.tokenizer.save_pretrained(path)
                    sync_tree(path)
        if state.best is not None:
            state.best.observe(result.steps, scores["validation"], **selection)
        job.write_outputs(found)
        state.engine.ranks.raise_together(folder.failure)
        folder.write_json(
            "summary.json",
            summary(
                found,
                result,
                metric_name=job.target.score,
                averager=averager,
                window=window,
                best=state.best and state.best.found,
            ),
        )
        state.engine.ranks.raise_together(folder.failure)
        if folder.best.exists():
            saved["best"] = folder.best
        progress.saved(saved)
        if scores:
            progress.table(scores_table(scores, seconds=result.seconds))
        folder.release()
        progress.close()


def start_run(
    config: FineTuningConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    job: Job,
    *,
    target: Target,
    interruption: Interruption,
) -> Run:
    """Start the engine, and bring a run back to where its checkpoint left it, where it has one (collective).

    Args:
        config: as of :func:`fine_tune`.
        accelerator: likewise.
        folder: likewise.
        job: likewise.
        target: the score that weights are chosen by.
        interruption: whether the run was asked to end.
    """
    checkpoint, rows, settings = folder.checkpoint, job.datasets["train"], config.train
    num_parameters = count_parameters(job.model)
    architecture_sha256, frozen_sha256 = fingerprint_architecture(job.model), fingerprint_frozen(job.model)
    # From here on the weights may live in shards.
    loader = training_loader(rows, job.collate, settings, accelerator)
    model, optimizer, loader = prepare(
        accelerator, job.model, partial(build_optimizer, train=settings), loader
    )
    total_steps = count_optimizer_steps(
        micro_batches=len(loader),
        accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    world_size = accelerator.num_processes
    setup = Setup(
        stage=zero_stage(model),
        world_size=world_size,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        rows_per_step=settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
        * world_size,
        grouped_by=settings.per_device_train_batch_size * world_size if settings.group_by_length else None,
        total_steps=total_steps,
        rows=len(rows),
        rows_sha256=fingerprint_rows(rows),
        architecture_sha256=architecture_sha256,
        frozen_sha256=frozen_sha256,
        seed=settings.seed,
    )
    record = None
    if checkpoint is not None:  # before an averager is attached: it takes weights as it finds them
        first = [rows[i] for i in range(min(len(rows), settings.per_device_train_batch_size))]
        settle_buckets(accelerator, model, job.objective, job.collate(first))
        record = load_engine_state(checkpoint, accelerator, model, optimizer, setup)
    averager = None
    if job.rule is not None:
        averager = swaft.WeightAverager(
            model,
            optimizer,
            rule=job.rule,
            total_steps=total_steps,
            first_step=record.applied_steps if record else 0,
            precision=config.averaging.precision,
            threads=config.averaging.threads,
            spill_dir=config.averaging.spill_dir,
        )
    engine = averager.engine if averager else attach_engine(model, optimizer)
    best = None
    if watches_weights(config.eval):
        best = BestWeights(
            config.eval,
            target=target,
            folder=folder.best,
            tokenizer=job.tokenizer,
            engine=engine,
            averager=averager,
        )
    state = RunState(
        accelerator=accelerator,
        model=model,
        engine=engine,
        averager=averager,
        objective=job.objective,
        meter=Meter(accelerator),
        best=best,
        position=Position(),
        folder=folder,
        setup=setup,
        settings=flatten(config),
        save_total_limit=settings.save_total_limit,
    )
    if checkpoint is not None and record is not None:
        state.restore(checkpoint, record)
    folder.begin(to_yaml(config), accelerator, engine=engine.name)
    start_trackers(accelerator, config)
    set_seed(settings.seed, device_specific=True)  # each rank drops out units of its own
    if checkpoint is not None and record is not None:
        state.restore_random(checkpoint.path, record)
    progress = ProgressLog(
        accelerator,
        folder,
        total_steps=total_steps,
        averaging=config.averaging.rule,
        disable_tqdm=settings.disable_tqdm,
        done=state.position.step,
    )
    schedule = build_schedule(settings, total_steps=total_steps, averaging=job.rule is not None)
    progress.banner(
        run_facts(
            settings,
            accelerator,
            task=job.task,
            num_rows=len(rows),
            num_parameters=num_parameters,
            schedule=schedule,
            averager=averager,
        )
    )
    if checkpoint is not None:
        progress.goes_on(checkpoint.path, state.position.step)
    return Run(
        state=state,
        optimizer=optimizer,
        loader=loader,
        schedule=schedule,
        evaluations={
            name: partial(
                job.evaluate,
                model,
                evaluation_loader(
                    dataset,
                    job.collate,
                    accelerator,
                    interruption,
                    batch_size=config.eval.per_device_eval_batch_size,
                    num_workers=settings.dataloader_num_workers,
                ),
                name,
            )
            for name, dataset in job.datasets.items()
            if name != "train"
        },
        target=target,
        progress=progress,
        interruption=interruption,
    )
