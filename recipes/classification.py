"""Fine-tunes a pretrained model to classify texts or text pairs (or to score them), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/classification.py \
        --config recipes/configs/classification/mrpc.yaml averaging.rule=swa noise.kind=r3f

The same file runs in one process, under DDP and under DeepSpeed ZeRO 0 to 3. It leaves a run folder with the
last weights (final/), the averaged ones (final-averaged/), and the scores of both (summary.json).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from torch.utils.data import DataLoader

import swaft
from swaft.averaging import attach_engine, save_pretrained
from swaft.config import ClassificationConfig, load_config, to_yaml
from swaft.data import Collator, describe_task, load_splits, tokenize
from swaft.metrics import get_metric, metric_for_task
from swaft.training.accelerator import build_accelerator, whole_model_loading
from swaft.training.build import build_objective, build_optimizer, build_rule, count_parameters
from swaft.training.evaluate import best_window, evaluate, evaluate_last_and_averaged
from swaft.training.failure import leave, run_and_report
from swaft.training.loop import train
from swaft.training.pretrained import (
    describe_labels,
    hidden_size,
    load_classifier,
    load_model_config,
    load_tokenizer,
)
from swaft.training.progress import ProgressLog, scores_table, setup_logging, start_trackers
from swaft.training.run_folder import RunFolder
from swaft.training.schedule import build_schedule, count_optimizer_steps
from swaft.training.summary import run_facts, summary


def run(config: ClassificationConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found before there is one.
    model_config = load_model_config(config.model)
    objective = build_objective(config.noise, seed=config.train.seed)
    rule = build_rule(config.averaging)
    accelerator = build_accelerator(config, hidden_size=hidden_size(model_config))
    folder = RunFolder.create(config.train.output_dir, accelerator)

    # Data: every split that is there, as token ids.
    splits = load_splits(config.data)
    task = describe_task(splits, config.data)
    metric_name = config.eval.metric
    if metric_name == "auto":
        metric_name = metric_for_task(config.data.task_name, is_regression=task.is_regression)
    metric = get_metric(
        metric_name,
        is_regression=task.is_regression,
        num_labels=task.num_labels,
    )
    tokenizer = load_tokenizer(config.model)
    datasets = {
        name: tokenize(split, task, tokenizer, config.data.max_seq_length) for name, split in splits.items()
    }
    collator = Collator(tokenizer)

    # Model: the pretrained body with a new head, the same on every rank.
    describe_labels(model_config, task, pad_token_id=tokenizer.pad_token_id)
    with whole_model_loading(accelerator):
        model = load_classifier(
            config.model,
            model_config,
            seed=config.train.seed,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
    objective.prepare_model(model)
    num_parameters = count_parameters(model)

    # Engine: from here on the weights may live in shards.
    train_loader = DataLoader(
        datasets["train"],  # type: ignore[arg-type]
        batch_size=config.train.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(config.train.seed),
        collate_fn=collator,
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
        name: partial(
            evaluate,
            model,
            evaluation_loader(dataset, collator, config, accelerator),
            metric,
            accelerator,
            num_rows=len(dataset),
            is_regression=task.is_regression,
        )
        for name, dataset in datasets.items()
        if name != "train"
    }

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
            task="regression" if task.is_regression else f"{task.num_labels} classes",
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
        evaluate_once=evaluations.get("validation"),
        eval_steps=config.eval.eval_steps,
    )

    # Evaluate the last weights and the averaged ones, and keep both.
    window = best_window(averager, evaluations.get("validation"), metric.primary)
    if window:
        progress.window(window)
    selection: dict[str, Any] = {"start": window.best.start, "end": window.best.end} if window else {}
    scores = {
        name: evaluate_last_and_averaged(once, averager, **selection) for name, once in evaluations.items()
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
        "summary.json",
        summary(scores, result, metric_name=metric.primary, averager=averager, window=window),
    )
    progress.saved(saved)
    if scores:
        progress.table(scores_table(scores, seconds=result.seconds))
    progress.close()


def evaluation_loader(
    dataset: Dataset, collator: Collator, config: ClassificationConfig, accelerator: Accelerator
) -> DataLoader[Any]:
    """Return a loader over every row, which draws from no generator that training draws from."""
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=config.eval.per_device_eval_batch_size,
        generator=torch.Generator(),
        collate_fn=collator,
        num_workers=config.train.dataloader_num_workers,
    )
    return accelerator.prepare_data_loader(loader)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    setup_logging()
    return run_and_report(
        lambda: run(load_config(ClassificationConfig, sys.argv[1:] if argv is None else argv))
    )


if __name__ == "__main__":
    leave(main())
