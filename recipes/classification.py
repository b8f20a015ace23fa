"""Fine-tunes a pretrained model to classify texts or text pairs (or to score them), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/classification.py \
        --config recipes/configs/classification/mrpc.yaml averaging.rule=swa noise.kind=r3f

The same file runs in one process, under DDP and under DeepSpeed ZeRO 0 to 3. It leaves a run folder with the
last weights (final/), the averaged ones (final-averaged/), and the scores of both (summary.json).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from swaft.config import ClassificationConfig, load_config
from swaft.data import Collator, describe_task, load_splits, tokenize
from swaft.metrics import get_metric, metric_for_task
from swaft.training.accelerator import build_accelerator, whole_model_loading
from swaft.training.build import build_objective, build_rule
from swaft.training.evaluate import Evaluation, evaluate
from swaft.training.failure import leave, run_and_report
from swaft.training.fine_tune import Target, fine_tune
from swaft.training.pretrained import (
    describe_labels,
    hidden_size,
    load_classifier,
    load_model_config,
    load_tokenizer,
)
from swaft.training.progress import setup_logging
from swaft.training.run_folder import RunFolder


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

    def score(model: nn.Module, loader: DataLoader[Any], split: str) -> Evaluation:
        num_rows, is_regression = len(datasets[split]), task.is_regression
        scores = evaluate(model, loader, metric, accelerator, num_rows=num_rows, is_regression=is_regression)
        return Evaluation(scores=scores)

    fine_tune(
        config,
        accelerator,
        folder,
        task="regression" if task.is_regression else f"{task.num_labels} classes",
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        rule=rule,
        datasets=datasets,
        collate=Collator(tokenizer),
        evaluate=score,
        target=Target(score=metric.primary),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    setup_logging()
    return run_and_report(
        lambda: run(load_config(ClassificationConfig, sys.argv[1:] if argv is None else argv))
    )


if __name__ == "__main__":
    leave(main())
