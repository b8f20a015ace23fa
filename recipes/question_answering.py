"""Fine-tunes a pretrained model for extractive question answering, and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/question_answering.py \
        --config recipes/configs/question_answering/squad.yaml averaging.rule=ema

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It writes a run folder with the last
weights (final/), the averaged ones (final-averaged/), the scores of both (summary.json), their answers in the
format of the official SQuAD scripts (predictions-*.json), and some samples of them (samples-*.jsonl).
"""

from __future__ import annotations

from collections.abc import Sequence

import swaft
from swaft.averaging.rules import Readout
from swaft.training.checks import Prepared, Problems, start_of
from swaft.training.config import build_rule
from swaft.training.data.question_answering import (
    QuestionAnsweringConfig,
    check_questions,
    may_have_no_answer,
    refuse_unusable_questions,
    require_offsets,
    tokenize_questions,
)
from swaft.training.data.sources import load_splits
from swaft.training.data.texts import Collator, read_as_text, report_special_tokens, require_length
from swaft.training.evaluation.answering import (
    AnswerSearch,
    evaluate_answers,
    get_question_metric,
    refuse_score_of_no_question,
    refuse_unused_threshold,
    report_windows,
    write_predictions,
)
from swaft.training.evaluation.best import choose_target
from swaft.training.evaluation.evaluate import Evaluation, write_samples
from swaft.training.launch.accelerator import build_accelerator
from swaft.training.launch.failure import leave
from swaft.training.models.build import build_objective, build_optimizer, build_schedule
from swaft.training.models.checks import check_model, require_decoder_start, require_token_types
from swaft.training.models.pretrained import load_model_config, load_tokenizer, load_with_head, longest_text
from swaft.training.models.special_tokens import one_length, whole_windows
from swaft.training.run.run import Evaluations, Run, run_recipe

Config = QuestionAnsweringConfig


class PreparedQuestions(Prepared):
    """What a run needs that depends on no device and no other rank."""

    has_unanswerable: bool
    """Whether "none" is an answer."""
    collate: Collator
    cuts_rows = True
    columns = "question, context -> answers"

    @property
    def description(self) -> str:
        """What is learned, in words."""
        return f"finding answers, scored by {self.metric.name}"


def prepare(config: QuestionAnsweringConfig, problems: Problems) -> PreparedQuestions:
    """Find and check everything that needs no device and no other rank; problems are collected."""
    ready = PreparedQuestions()
    with problems:  # a problem ends its block, and later blocks that need something from it are skipped
        ready.rows = check_questions(load_splits(config.data), skip_bad_rows=config.data.skip_bad_rows)
    with problems:
        ready.has_unanswerable = may_have_no_answer(ready.rows, config.data.version_2_with_negative)
    with problems:
        refuse_unused_threshold(config.eval, has_unanswerable=ready.has_unanswerable)
    with problems:
        ready.model_config = load_model_config(config.model, num_labels=2)  # the first token and the last
    with problems:
        ready.tokenizer = load_tokenizer(config.model)
        require_offsets(ready.tokenizer)
        read_as_text(ready.tokenizer, config.data.split_special_tokens)
    with problems:
        report_special_tokens(ready.rows, ("question", "context"), ready.tokenizer)
    check_model(ready, config, problems)
    with problems:
        require_decoder_start(config.model, ready.model_config)
    with problems:
        require_token_types(config.model, ready.model_config, ready.tokenizer, ("question", "context"))
    with problems:
        most = longest_text(ready.model_config, ready.tokenizer)
        require_length("data.max_seq_length", config.data.max_seq_length, most)
    with problems:
        refuse_unusable_questions(ready.rows, ready.tokenizer, config.data)
    with problems:
        length = one_length(ready.model_config, config.data.max_seq_length)
        ready.collate = Collator(ready.tokenizer, length, whole_windows(ready.model_config))
    with problems:
        ready.metric = get_question_metric(config.eval.metric, has_unanswerable=ready.has_unanswerable)
    with problems:
        ready.objective = build_objective(config.noise, seed=config.train.seed)
    with problems:
        ready.rule = build_rule(config.averaging)
    with problems:
        ready.target = choose_target(config.eval, ready.metric, ready.rows, config.averaging)
        refuse_score_of_no_question(config.eval, ready.rows)
    return ready


def train(config: QuestionAnsweringConfig) -> None:
    """Fine-tune, evaluate and save."""
    # Everything that can be checked without a process group is checked before there is one.
    ready, start = start_of(config, prepare)
    tokenizer, objective = ready.tokenizer, ready.objective

    with Run(config, build_accelerator(config, start.engine)) as run:
        # Data: every split, as overlapping windows of token ids.
        windows = {
            name: tokenize_questions(split, tokenizer, config.data, training=name == "train")
            for name, split in ready.rows.items()
        }
        report_windows(ready.rows, windows)

        # Model: the pretrained body with a new head, the same on every rank.
        with run.loading():
            model = load_with_head(config, ready.model_config)
        objective.prepare_model(model)

        # Engine: accelerator.prepare, and the weights of a checkpoint if the run resumes.
        model, optimizer, loader = run.prepare(
            model,
            lambda model: build_optimizer(model, config.train),
            windows["train"],
            ready.collate,
            objective=objective,
        )
        averager = None
        if ready.rule is not None:
            averager = swaft.WeightAverager(
                model, optimizer, rule=ready.rule, total_steps=run.total_steps, **run.averaging_options
            )
        schedule = build_schedule(config.train, total_steps=run.total_steps, averaging=averager is not None)
        run.begin(ready, tokenizer, windows, schedule=schedule, averager=averager, objective=objective)

        # Evaluation: the last weights, then the averaged ones in their place.
        loaders = run.evaluation_loaders(windows, ready.collate)
        search = AnswerSearch(
            has_unanswerable=ready.has_unanswerable,
            max_answer_length=config.eval.max_answer_length,
            null_score_diff_threshold=config.eval.null_score_diff_threshold,
            padding_side=tokenizer.padding_side,
        )

        def score(split: str) -> Evaluation:
            return evaluate_answers(
                model,
                loaders[split],
                run.accelerator,
                questions=ready.rows[split],
                windows=windows[split],
                metric=ready.metric,
                search=search,
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

        def write_outputs(found: dict[str, Evaluations]) -> None:
            write_predictions(run.folder, found, ready.rows)
            columns = ("id", "question", "answers")
            write_samples(run.folder, found, ready.rows, config.eval.num_samples, columns=columns)

        run.finish(score_both, loaders, window=run.best_window(score), write_outputs=write_outputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    return run_recipe(train, Config, argv)


if __name__ == "__main__":
    leave(main())
