"""Fine-tunes a pretrained model to classify texts or text pairs (or to score them), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/classification.py \
        --config recipes/configs/classification/mrpc.yaml averaging.rule=ema

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It writes a run folder with the
last weights (final/), the averaged ones (final-averaged/), and the scores of both (summary.json).
"""

from __future__ import annotations

from collections.abc import Sequence

import swaft
from swaft.averaging.rules import Readout
from swaft.training.checks import Prepared, Problems, start_of
from swaft.training.config import build_rule
from swaft.training.data.classification import (
    ClassificationConfig,
    Task,
    describe_task,
    report_lengths,
    tokenize,
)
from swaft.training.data.sources import language_groups, load_splits, task_of
from swaft.training.data.texts import (
    Collator,
    read_as_text,
    refuse_rows_without_tokens,
    report_special_tokens,
    require_length,
)
from swaft.training.evaluation.best import choose_target
from swaft.training.evaluation.evaluate import Evaluation, evaluate_classes
from swaft.training.launch.accelerator import build_accelerator
from swaft.training.launch.failure import leave
from swaft.training.metrics import Metric, get_metric, renumbered
from swaft.training.models.build import build_objective, build_optimizer, build_schedule
from swaft.training.models.checks import check_model, require_decoder_start, require_token_types
from swaft.training.models.classes import FittedHead, describe_labels, fit_head, require_end_token
from swaft.training.models.pretrained import load_model_config, load_tokenizer, load_with_head, longest_text
from swaft.training.models.special_tokens import one_length
from swaft.training.run.run import Run, run_recipe

Config = ClassificationConfig


class PreparedTask(Prepared):
    """What a run needs that depends on no device and no other rank."""

    task: Task
    """What is learned from the rows."""
    head: FittedHead
    """The task in the class order of the model's own head, if that head is kept."""
    collate: Collator

    @property
    def description(self) -> str:
        """What is learned, in words."""
        return "regression" if self.task.is_regression else f"{self.task.num_labels} classes"


def prepare(config: ClassificationConfig, problems: Problems) -> PreparedTask:
    """Find and check everything that needs no device and no other rank; problems are collected."""
    ready = PreparedTask()
    with problems:  # a problem ends its block, and later blocks that need something from it are skipped
        ready.task = describe_task(load_splits(config.data), config.data)
        ready.columns, ready.rows = ready.task, ready.task.rows
    with problems:
        ready.tokenizer = load_tokenizer(config.model)
        read_as_text(ready.tokenizer, config.data.split_special_tokens)
    with problems:
        ready.model_config = load_model_config(config.model)
    with problems:
        ready.head = fit_head(ready.task, config.model, ready.model_config)
    with problems:
        report_special_tokens(ready.rows, ready.task.text_columns, ready.tokenizer)
    check_model(ready, config, problems)
    with problems:
        require_decoder_start(config.model, ready.model_config)
    with problems:
        require_token_types(config.model, ready.model_config, ready.tokenizer, ready.task.text_columns)
    with problems:
        refuse_rows_without_tokens(ready.rows, ready.task.text_columns, ready.tokenizer)
    with problems:
        require_end_token(ready.model_config, ready.tokenizer)
    with problems:
        most = longest_text(ready.model_config, ready.tokenizer)
        require_length("data.max_seq_length", config.data.max_seq_length, most)
    with problems:
        length = one_length(ready.model_config, config.data.max_seq_length)
        ready.collate = Collator(ready.tokenizer, length)
    with problems:
        describe_labels(ready.model_config, ready.head.task, pad_token_id=ready.tokenizer.pad_token_id)
    with problems:
        ready.metric = choose_metric(config, ready.task)
    with problems:
        ready.objective = build_objective(config.noise, seed=config.train.seed)
    with problems:
        ready.rule = build_rule(config.averaging)
    with problems:
        ready.target = choose_target(config.eval, ready.metric, ready.rows, config.averaging)
    with problems:
        if ready.head.order is not None:  # class ids in the kept head's order
            ready.metric = renumbered(ready.metric, ready.head.order)
    return ready


def choose_metric(config: ClassificationConfig, task: Task) -> Metric:
    """Return the metric the settings name, for the class they call positive."""
    return get_metric(
        config.eval.metric,
        task_name=task_of(config.data),
        is_regression=task.is_regression,
        num_labels=task.num_labels,
        label_names=task.label_names,
        positive_label=config.data.positive_label,
    )


def train(config: ClassificationConfig) -> None:
    """Fine-tune, evaluate and save."""
    # Everything that can be checked without a process group is checked before there is one.
    ready, start = start_of(config, prepare)
    task, tokenizer, objective = ready.head.task, ready.tokenizer, ready.objective

    with Run(config, build_accelerator(config, start.engine)) as run:
        # Data: every split, as token ids.
        length, workers = config.data.max_seq_length, config.data.preprocessing_num_workers
        datasets = {
            name: tokenize(split, task, tokenizer, length, workers=workers)
            for name, split in ready.rows.items()
        }
        report_lengths(datasets["train"], length)

        # Model: the pretrained body with a new head, the same on every rank.
        with run.loading():
            model = load_with_head(config, ready.model_config, has_new_head=ready.head.is_new)
        objective.prepare_model(model)

        # Engine: accelerator.prepare, and the weights of a checkpoint if the run resumes.
        model, optimizer, loader = run.prepare(
            model,
            lambda model: build_optimizer(model, config.train),
            datasets["train"],
            ready.collate,
            objective=objective,
        )
        averager = None
        if ready.rule is not None:
            averager = swaft.WeightAverager(
                model, optimizer, rule=ready.rule, total_steps=run.total_steps, **run.averaging_options
            )
        schedule = build_schedule(config.train, total_steps=run.total_steps, averaging=averager is not None)
        run.begin(ready, tokenizer, datasets, schedule=schedule, averager=averager, objective=objective)

        # Evaluation: the last weights, then the averaged ones in their place.
        loaders = run.evaluation_loaders(datasets, ready.collate)

        def score(split: str) -> Evaluation:
            return evaluate_classes(
                model, loaders[split], run.accelerator, metric=ready.metric, num_rows=len(datasets[split])
            )

        def score_both(split: str, readout: Readout | None = None) -> dict[str, Evaluation]:
            found = {"last": score(split)}
            if averager and averager.num_averaged:
                with averager.swapped_in(readout):
                    found["averaged"] = score(split)
            return found

        # Training.
        for step in run.steps(loader, score_both):
            run.set_learning_rate(schedule(run.applied_steps))
            for batch, share in step.micro_batches():
                out = objective(model, batch)
                step.log(**out.logged)
                step.backward(out.loss * share)
            step.clip_gradients()
            optimizer.step()
            optimizer.zero_grad()
            if averager:
                averager.step()

        run.finish(
            score_both,
            loaders,
            window=run.best_window(score),
            means=language_groups(ready.rows, config.data),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    return run_recipe(train, Config, argv)


if __name__ == "__main__":
    leave(main())
