"""What every recipe does once it has its data, its model and its metric: train, average, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler

import swaft
from swaft.averaging import attach_engine, save_pretrained
from swaft.averaging.rules import Rule
from swaft.config import AveragingConfig, EvalConfig, to_yaml
from swaft.training.accelerator import RunConfig
from swaft.training.build import build_optimizer, count_parameters
from swaft.training.evaluate import Evaluation, Scores, best_window, evaluate_last_and_averaged
from swaft.training.loop import train
from swaft.training.progress import ProgressLog, scores_table, start_trackers
from swaft.training.run_folder import RunFolder
from swaft.training.schedule import build_schedule, count_optimizer_steps
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
class Target:
    """What decides between weights: a score, and whether more of it is better."""

    score: str
    """Its name among the scores of an evaluation."""
    better: Callable[..., float] = max
    """The built-in ``max`` or ``min``."""


def fine_tune(
    config: FineTuningConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    *,
    task: str,
    model: nn.Module,
    tokenizer: Any,
    objective: Any,
    rule: Rule | None,
    datasets: Mapping[str, Dataset],
    collate: Callable[[list[Any]], dict[str, Any]],
    evaluate: Evaluate,
    target: Target,
    sampler: Sampler[int] | None = None,
) -> Evaluations:
    """Fine-tune, evaluate the last and the averaged weights, and save both (collective).

    Leaves in the run folder what the run was (config.yaml, command.txt, env.json), metrics.jsonl, the weights
    (final/, final-averaged/) with the tokenizer, and summary.json.

    Args:
        config: sections ``train``, ``averaging``, ``eval`` and ``track``.
        accelerator: nothing prepared yet.
        folder: of this run.
        task: what is learnt, in words, for the banner.
        model: on the host, as the objective prepared it; the same on every rank.
        tokenizer: saved beside the weights.
        objective: loss of a micro-batch, from `build_objective`.
        rule: what to average; None: nothing.
        datasets: rows by split; all but ``train`` are evaluated, ``validation`` also while training.
        collate: makes a batch of rows.
        evaluate: see `Evaluate`.
        target: what the best window of averaged weights is chosen by, and the summary names first.
        sampler: order of the training rows, the same on every rank; None: shuffled.

    Returns:
        The final evaluations, the same on every rank.
    """
    num_parameters = count_parameters(model)

    # Engine: from here on the weights may live in shards.
    train_loader = DataLoader(
        datasets["train"],  # type: ignore[arg-type]
        batch_size=config.train.per_device_train_batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        generator=torch.Generator().manual_seed(config.train.seed),
        collate_fn=collate,
        num_workers=config.train.dataloader_num_workers,
    )
    optimizer = build_optimizer(model, config.train)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    total_steps = count_optimizer_steps(
        micro_batches=len(train_loader),
        accumulation_steps=config.train.gradient_accumulation_steps,
        num_train_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps,
    )
    schedule = build_schedule(config.train, total_steps=total_steps, averaging=rule is not None)
    averager = None
    if rule is not None:
        averager = swaft.WeightAverager(
            model,
            optimizer,
            rule=rule,
            total_steps=total_steps,
            precision=config.averaging.precision,
            threads=config.averaging.threads,
            spill_dir=config.averaging.spill_dir,
        )
    engine = averager.engine if averager else attach_engine(model, optimizer)
    evaluations = {
        name: partial(evaluate, model, evaluation_loader(dataset, collate, config, accelerator), name)
        for name, dataset in datasets.items()
        if name != "train"
    }
    validate: Callable[[], Scores] | None = None
    if "validation" in evaluations:
        validate = lambda: evaluations["validation"]().scores  # noqa: E731

    # Train.
    folder.write_provenance(to_yaml(config), accelerator, engine=engine.name)
    start_trackers(accelerator, config)
    progress = ProgressLog(
        accelerator,
        folder,
        total_steps=total_steps,
        averaging=config.averaging.rule,
        disable_tqdm=config.train.disable_tqdm,
    )
    progress.banner(
        run_facts(
            config.train,
            accelerator,
            task=task,
            num_rows=len(datasets["train"]),
            num_parameters=num_parameters,
            schedule=schedule,
            averager=averager,
        )
    )
    set_seed(config.train.seed, device_specific=True)  # each rank drops out units of its own
    result = train(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        loader=train_loader,
        objective=objective,
        engine=engine,
        schedule=schedule,
        settings=config.train,
        progress=progress,
        averager=averager,
        evaluate_once=validate,
        eval_steps=config.eval.eval_steps,
    )

    # Evaluate the last weights and the averaged ones, and keep both.
    window = best_window(averager, validate, target.score, better=target.better)
    if window:
        progress.window(window)
    selection: dict[str, Any] = {"start": window.best.start, "end": window.best.end} if window else {}
    found = {
        name: evaluate_last_and_averaged(once, averager, **selection) for name, once in evaluations.items()
    }
    scores = {
        name: {kind: evaluation.scores for kind, evaluation in kinds.items()} for name, kinds in found.items()
    }
    for name, kinds in scores.items():
        progress.evaluation(result.steps, name, kinds)
    saved = {"last": folder.final}
    save_pretrained(engine, folder.final)
    if averager:
        saved["averaged"] = folder.final_averaged
        averager.save_pretrained(folder.final_averaged, **selection)
    if accelerator.is_main_process:
        for path in saved.values():
            tokenizer.save_pretrained(path)
    folder.write_json(
        "summary.json", summary(found, result, metric_name=target.score, averager=averager, window=window)
    )
    progress.saved(saved)
    if scores:
        progress.table(scores_table(scores, seconds=result.seconds))
    progress.close()
    return found


def evaluation_loader(
    dataset: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: FineTuningConfig,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """Return a loader over every row, which draws from no generator that training draws from."""
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=config.eval.per_device_eval_batch_size,
        generator=torch.Generator(),
        collate_fn=collate,
        num_workers=config.train.dataloader_num_workers,
    )
    return accelerator.prepare_data_loader(loader)
