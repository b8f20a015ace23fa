"""Fine-tunes a pretrained model to find the answers to questions in a text, and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/question_answering.py \
        --config recipes/configs/question_answering/squad.yaml averaging.rule=swa noise.kind=r3f

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It leaves a run folder with the last
weights (final/), the averaged ones (final-averaged/), the scores of both (summary.json), their answers as the
official SQuAD scripts read them (predictions-*.json), and some of them to read (samples-*.jsonl).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import DataLoader

from swaft.averaging.rules import Rule
from swaft.config import QuestionAnsweringConfig, load_config
from swaft.config.rule import build_rule
from swaft.data import (
    WindowCollator,
    check_questions,
    load_splits,
    may_have_no_answer,
    read_as_text,
    refuse_long_questions,
    report_special_tokens,
    require_length,
    require_offsets,
    tokenize_questions,
)
from swaft.metrics import QuestionMetric, get_question_metric
from swaft.training.answering import (
    evaluate_answers,
    refuse_unused_threshold,
    report_windows,
    write_predictions,
)
from swaft.training.best import choose_target
from swaft.training.build import build_objective
from swaft.training.evaluate import Evaluation
from swaft.training.fine_tune import Evaluations, Job, Target, fine_tune
from swaft.training.generation import write_samples
from swaft.training.launch.accelerator import build_accelerator, whole_model_loading
from swaft.training.launch.failure import leave, run_and_report
from swaft.training.pretrained import (
    load_model_config,
    load_question_answerer,
    load_tokenizer,
    longest_text,
    require_question_answering,
)
from swaft.training.problems import Problems
from swaft.training.progress import setup_logging
from swaft.training.refusals import (
    require_decoder_start,
    require_embeddings,
    require_text,
    require_token_types,
    require_weights,
)
from swaft.training.run.folder import RunFolder
from swaft.training.special_tokens import follow_tokenizer, one_length
from swaft.training.start import start_of

Config = QuestionAnsweringConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs that neither a device nor other ranks have to do with."""

    rows: Mapping[str, Any]
    """Dataset by split."""
    has_unanswerable: bool
    """Whether "none" is an answer."""
    metric: QuestionMetric
    model_config: Any
    tokenizer: Any
    collate: WindowCollator
    objective: Any
    rule: Rule | None
    target: Target
    """What decides between weights, unless the settings name another score."""
    cuts_rows: ClassVar[bool] = True

    @property
    def description(self) -> str:
        """What is learnt, in words."""
        return f"finding answers, scored by {self.metric.name}"


def prepare(config: QuestionAnsweringConfig, problems: Problems) -> Prepared:
    """Find and check everything that needs no device and no other rank; what is wrong goes on the list."""
    splits = problems.of(load_splits, config.data)
    report = problems.of(check_questions, splits, skip_bad_rows=config.data.skip_bad_rows)
    has_unanswerable = problems.of(may_have_no_answer, report, config.data.version_2_with_negative)
    problems.of(refuse_unused_threshold, config.eval, has_unanswerable=has_unanswerable)
    model_config = problems.of(load_model_config, config.model, num_labels=2)  # the first token and the last
    problems.of(require_question_answering, config.model, model_config)
    problems.of(require_weights, config.model, model_config)
    problems.of(require_text, config.model, model_config)
    tokenizer = problems.of(load_tokenizer, config.model)
    problems.of(require_offsets, tokenizer)
    problems.of(read_as_text, tokenizer, config.data.split_special_tokens)
    problems.of(follow_tokenizer, model_config, tokenizer)
    length = problems.of(one_length, model_config, config.data.max_seq_length)
    problems.of(require_embeddings, config.model, model_config, tokenizer)
    problems.of(require_token_types, config.model, model_config, tokenizer, ("question", "context"))
    problems.of(require_decoder_start, config.model, model_config, tokenizer)
    most = problems.of(longest_text, model_config, tokenizer)
    problems.of(require_length, "data.max_seq_length", config.data.max_seq_length, most)
    problems.of(
        refuse_long_questions,
        report.rows,
        tokenizer,
        max_seq_length=config.data.max_seq_length,
        doc_stride=config.data.doc_stride,
    )
    metric = problems.of(get_question_metric, config.eval.metric, has_unanswerable=has_unanswerable)
    target = problems.of(main_score, metric)
    problems.of(choose_target, config.eval, target, report.rows)
    return Prepared(
        rows=report.rows,
        has_unanswerable=has_unanswerable,
        metric=metric,
        model_config=model_config,
        tokenizer=tokenizer,
        collate=problems.of(WindowCollator, tokenizer, length),
        objective=problems.of(build_objective, config.noise, seed=config.train.seed),
        rule=problems.of(build_rule, config.averaging),
        target=target,
    )


def main_score(metric: QuestionMetric) -> Target:
    """Return what decides between weights: the metric's first score."""
    return Target(score=metric.primary, names=metric.names)


def run(config: QuestionAnsweringConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found, all of it, before there is one.
    ready, start = start_of(config, prepare)
    tokenizer = ready.tokenizer
    accelerator = build_accelerator(config, start.engine)
    folder = RunFolder.of(config, accelerator)

    # Data: every split that is there, as overlapping windows of token ids.
    report_special_tokens(ready.rows, ("question", "context"), tokenizer)
    windows = {
        name: tokenize_questions(
            split,
            tokenizer,
            max_seq_length=config.data.max_seq_length,
            doc_stride=config.data.doc_stride,
            training=name == "train",
        )
        for name, split in ready.rows.items()
    }
    report_windows(ready.rows, windows)

    # Model: the pretrained body with a new head, the same on every rank.
    with whole_model_loading(accelerator):
        model = load_question_answerer(
            config.model,
            ready.model_config,
            seed=config.train.seed,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
    ready.objective.prepare_model(model)

    def score(model: nn.Module, loader: DataLoader[Any], split: str) -> Evaluation:
        return evaluate_answers(
            model,
            loader,
            accelerator,
            questions=ready.rows[split],
            windows=windows[split],
            padding_side=tokenizer.padding_side,
            metric=ready.metric,
            has_unanswerable=ready.has_unanswerable,
            settings=config.eval,
        )

    def write_outputs(found: Evaluations) -> None:
        write_predictions(folder, found, ready.rows)
        columns = ("id", "question", "answers")
        write_samples(folder, found, ready.rows, config.eval.num_samples, columns=columns)

    job = Job(
        task=ready.description,
        model=model,
        tokenizer=tokenizer,
        objective=ready.objective,
        rule=ready.rule,
        datasets=windows,
        collate=ready.collate,
        evaluate=score,
        target=ready.target,
        write_outputs=write_outputs,
    )
    fine_tune(config, accelerator, folder, job)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    setup_logging()
    return run_and_report(
        lambda: run(load_config(QuestionAnsweringConfig, sys.argv[1:] if argv is None else argv))
    )


if __name__ == "__main__":
    leave(main())
