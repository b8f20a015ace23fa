"""Fine-tunes a pretrained model to classify texts or text pairs (or to score them), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/classification.py \
        --config recipes/configs/classification/mrpc.yaml averaging.rule=swa noise.kind=r3f

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It leaves a run folder with the
last weights (final/), the averaged ones (final-averaged/), and the scores of both (summary.json).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import swaft
from swaft.averaging.rules import Readout, Rule
from swaft.training.checks.problems import Problems
from swaft.training.checks.refusals import (
    require_decoder_start,
    require_embeddings,
    require_text,
    require_token_types,
    require_weights,
)
from swaft.training.checks.start import start_of
from swaft.training.config import ClassificationConfig, build_rule, load_config
from swaft.training.data.checks import require_length
from swaft.training.data.classification import Task, describe_task, tokenize
from swaft.training.data.sources import language_groups, load_splits
from swaft.training.data.texts import (
    Collator,
    read_as_text,
    refuse_rows_without_tokens,
    report_special_tokens,
)
from swaft.training.evaluation.best import Target, choose_target
from swaft.training.evaluation.evaluate import Evaluation, evaluate_classes
from swaft.training.launch.failure import leave, run_and_report
from swaft.training.metrics.classification import get_metric, renumbered
from swaft.training.metrics.names import Metric
from swaft.training.models.build import build_objective, build_optimizer
from swaft.training.models.heads import fit_head
from swaft.training.models.pretrained import (
    describe_labels,
    load_model_config,
    load_tokenizer,
    load_with_head,
    longest_text,
)
from swaft.training.models.special_tokens import follow_tokenizer, one_length, require_end_token
from swaft.training.run.progress import setup_logging
from swaft.training.run.run import Run
from swaft.training.run.schedule import build_schedule, set_learning_rate

Config = ClassificationConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs that neither a device nor other ranks have to do with."""

    rows: Mapping[str, Any]
    """Dataset by split."""
    task: Task
    metric: Metric
    model_config: Any
    tokenizer: Any
    collate: Collator
    has_new_head: bool
    """Whether the head is a new one, whatever the model brings."""
    objective: Any
    rule: Rule | None
    target: Target
    """What decides between weights."""
    cuts_rows: ClassVar[bool] = False

    @property
    def description(self) -> str:
        """What is learnt, in words."""
        return "regression" if self.task.is_regression else f"{self.task.num_labels} classes"


def prepare(config: ClassificationConfig, problems: Problems) -> Prepared:
    """Find and check everything that needs no device and no other rank; what is wrong goes on the list."""
    task = problems.of(describe_task, problems.of(load_splits, config.data), config.data)
    tokenizer = problems.of(load_tokenizer, config.model)
    model_config = problems.of(load_model_config, config.model)
    problems.of(require_weights, config.model, model_config)
    problems.of(require_text, config.model, model_config)
    problems.of(read_as_text, tokenizer, config.data.split_special_tokens)
    problems.of(require_embeddings, config.model, model_config, tokenizer)
    problems.of(require_token_types, config.model, model_config, tokenizer, task.text_columns)
    problems.of(require_decoder_start, config.model, model_config, tokenizer)
    head = problems.of(fit_head, task, config.model, model_config)
    problems.of(refuse_rows_without_tokens, task.rows, task.text_columns, tokenizer)
    problems.of(follow_tokenizer, model_config, tokenizer)
    problems.of(require_end_token, model_config, tokenizer)
    length = problems.of(one_length, model_config, config.data.max_seq_length)
    most = problems.of(longest_text, model_config, tokenizer)
    problems.of(require_length, "data.max_seq_length", config.data.max_seq_length, most)
    problems.of(describe_labels, model_config, head.task, pad_token_id=tokenizer.pad_token_id)
    metric = problems.of(choose_metric, config, task)
    return Prepared(
        rows=task.rows,
        task=head.task,
        metric=problems.of(in_order, metric, head.order),
        model_config=model_config,
        tokenizer=tokenizer,
        collate=problems.of(Collator, tokenizer, length),
        has_new_head=head.is_new,
        objective=problems.of(build_objective, config.noise, seed=config.train.seed),
        rule=problems.of(build_rule, config.averaging),
        target=problems.of(choose_target, config.eval, metric, task.rows, config.averaging),
    )


def choose_metric(config: ClassificationConfig, task: Task) -> Metric:
    """Return the metric that the settings name, of the class that they call positive."""
    return get_metric(
        config.eval.metric,
        task_name=config.data.task_name,
        is_regression=task.is_regression,
        num_labels=task.num_labels,
        label_names=task.label_names,
        positive_label=config.data.positive_label,
    )


def in_order(metric: Metric, order: Sequence[int] | None) -> Metric:
    """Return the metric for class ids of this order, which a head that is kept has of its own."""
    return metric if order is None else renumbered(metric, order)


def train(config: ClassificationConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found, all of it, before there is one.
    ready, start = start_of(config, prepare)
    task, tokenizer, objective = ready.task, ready.tokenizer, ready.objective

    with Run.start(config, start.engine) as run:
        # Data: every split that is there, as token ids.
        report_special_tokens(ready.rows, task.text_columns, tokenizer)
        datasets = {
            name: tokenize(split, task, tokenizer, config.data.max_seq_length)
            for name, split in ready.rows.items()
        }

        # Model: the pretrained body with a new head, the same on every rank.
        with run.loading():
            model = load_with_head(
                "sequence classification",
                config.model,
                ready.model_config,
                seed=config.train.seed,
                gradient_checkpointing=config.train.gradient_checkpointing,
                has_new_head=ready.has_new_head,
            )
        objective.prepare_model(model)

        # Engine: accelerator.prepare, and the weights of a checkpoint where the run resumes.
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
                model,
                optimizer,
                rule=ready.rule,
                total_steps=run.total_steps,
                first_step=run.resumed_at,
                precision=config.averaging.precision,
                threads=config.averaging.threads,
                spill_dir=config.averaging.spill_dir,
            )
        schedule = build_schedule(config.train, total_steps=run.total_steps, averaging=averager is not None)
        run.begin(
            task=ready.description,
            schedule=schedule,
            target=ready.target,
            tokenizer=tokenizer,
            splits=datasets,
            averager=averager,
            objective=objective,
        )

        # Evaluation: the last weights, then the averaged ones in their place.
        loaders = {
            name: run.evaluation_loader(rows, ready.collate)
            for name, rows in datasets.items()
            if name != "train"
        }

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
            set_learning_rate(optimizer, schedule(run.applied_steps))
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
            list(loaders),
            window=run.best_window(score),
            means=language_groups(ready.rows, config.data),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    setup_logging()
    return run_and_report(
        lambda: train(load_config(ClassificationConfig, sys.argv[1:] if argv is None else argv))
    )


if __name__ == "__main__":
    leave(main())
