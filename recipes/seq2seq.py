"""Fine-tunes a pretrained encoder-decoder to generate text (summaries, translations), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/seq2seq.py \
        --config recipes/configs/seq2seq/scitldr.yaml averaging.rule=ema noise.kind=r3f

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It leaves a run folder with the last
weights (final/), the averaged ones (final-averaged/), the scores of both (summary.json), and texts that both
wrote (samples-validation.jsonl, samples-test.jsonl).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter

import swaft
from swaft.averaging.rules import Readout
from swaft.training.checks import Prepared, Problems, start_of
from swaft.training.config import build_rule
from swaft.training.data.seq2seq import (
    PairColumns,
    Seq2SeqConfig,
    find_pairs,
    read_pairs,
    report_lengths,
    tokenize_pairs,
)
from swaft.training.data.sources import load_splits
from swaft.training.data.texts import (
    Collator,
    read_as_text,
    refuse_rows_without_tokens,
    report_special_tokens,
    require_length,
)
from swaft.training.evaluation.best import choose_target
from swaft.training.evaluation.evaluate import Evaluation, write_samples
from swaft.training.evaluation.generation import evaluate_texts, generation_arguments, get_generation_metric
from swaft.training.launch.failure import leave
from swaft.training.metrics import Metric
from swaft.training.models.build import build_objective, build_optimizer, build_schedule, set_learning_rate
from swaft.training.models.checks import check_model
from swaft.training.models.encoder_decoder import (
    check_new_model,
    encoder_decoder_config,
    load_text_model,
    new_tokenizer,
    require_generation_start,
    require_target_language,
    set_languages,
)
from swaft.training.models.pretrained import load_tokenizer, longest_input
from swaft.training.models.special_tokens import one_length, whole_windows
from swaft.training.run.run import Run, run_recipe

Config = Seq2SeqConfig


class PreparedPairs(Prepared):
    """What a run needs that neither a device nor other ranks have to do with."""

    columns: PairColumns
    """Where sources and targets are."""
    length: int | None
    """Tokens that every source is padded to; None: to the longest of its batch."""

    @property
    def description(self) -> str:
        """What is learnt, in words."""
        return "text generation" if self.metric is None else f"text generation, scored by {self.metric.name}"


def prepare(config: Seq2SeqConfig, problems: Problems) -> PreparedPairs:
    """Find and check everything that needs no device and no other rank; what is wrong goes on the list."""
    ready = PreparedPairs()
    with problems:  # what is wrong in a block ends it, and those that need something of it are left out
        ready.columns = find_pairs(load_splits(config.data), config.data)
        ready.rows = {
            name: read_pairs(split, name, ready.columns) for name, split in ready.columns.rows.items()
        }
    with problems:
        ready.model_config = encoder_decoder_config(config.model)
    with problems:
        ready.metric = choose_metric(config, ready) if config.eval.predict_with_generate else None
    with problems:
        ready.tokenizer = load_tokenizer(config.model) if config.model.brings_tokenizer else None
    with problems:
        if ready.tokenizer is not None:
            read_as_text(ready.tokenizer, config.data.split_special_tokens)
            Collator(ready.tokenizer)
            report_special_tokens(ready.rows, ("source", "target"), ready.tokenizer)
    check_model(ready, config, problems)
    for side in ("source", "target"):
        with problems:
            if ready.tokenizer is not None:
                refuse_rows_without_tokens(ready.rows, (side,), ready.tokenizer)
    with problems:
        require_generation_start(config.model, ready.model_config, ready.tokenizer)
    with problems:
        check_new_model(config.model, ready.tokenizer)
    with problems:
        set_languages(ready.tokenizer, config.data, ready.columns)
        require_target_language(ready.model_config, ready.tokenizer)
    lengths = {"data.max_source_length": False, "data.max_target_length": True, "eval.max_new_tokens": True}
    for setting, decoder in lengths.items():
        with problems:
            most = longest_input(ready.model_config, ready.tokenizer, decoder=decoder)
            require_length(setting, attrgetter(setting)(config) or 0, most)
    with problems:
        ready.length = one_length(ready.model_config, config.data.max_source_length, generates=True)
    with problems:
        ready.objective = build_objective(
            config.noise, seed=config.train.seed, label_smoothing=config.train.label_smoothing_factor
        )
    with problems:
        ready.rule = build_rule(config.averaging)
    with problems:
        ready.target = choose_target(config.eval, ready.metric, ready.rows, config.averaging)
    return ready


def choose_metric(config: Seq2SeqConfig, ready: PreparedPairs) -> Metric:
    """Return the metric that the settings name, or that fits: T5 is told a translation, Marian translates."""
    data = config.data
    translates = (
        ready.columns.source_lang is not None
        or data.source_lang != data.target_lang
        or data.source_prefix.lower().startswith("translate ")
        or getattr(getattr(ready, "model_config", None), "model_type", "") == "marian"
    )
    return get_generation_metric(config.eval.metric, task_name=data.task_name, translates=translates)


def train(config: Seq2SeqConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found, all of it, before there is one.
    ready, start = start_of(config, prepare)
    pairs, model_config, objective = ready.rows, ready.model_config, ready.objective

    with Run.start(config, start.engine) as run:
        # Data: every split that is there, as token ids.
        tokenizer = ready.tokenizer
        if tokenizer is None:
            tokenizer = new_tokenizer(
                config.model,
                run.accelerator,
                texts=lambda: chain(pairs["train"]["source"][:], pairs["train"]["target"][:]),
            )
            read_as_text(tokenizer, config.data.split_special_tokens)
            report_special_tokens(pairs, ("source", "target"), tokenizer)
        datasets = {name: tokenize_pairs(rows, tokenizer, config.data) for name, rows in pairs.items()}
        report_lengths(datasets["train"], config.data)

        # Model: the pretrained one, or a new one of random weights, the same on every rank.
        with run.loading():
            model = load_text_model(config, model_config, tokenizer)
        objective.prepare_model(model)
        collate = Collator(tokenizer, ready.length, whole_windows(model_config))

        # Engine: accelerator.prepare, and the weights of a checkpoint where the run resumes.
        model, optimizer, loader = run.prepare(
            model,
            lambda model: build_optimizer(model, config.train),
            datasets["train"],
            collate,
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
        loaders = run.evaluation_loaders(datasets, collate)

        def score(split: str) -> Evaluation:
            return evaluate_texts(
                model,
                loaders[split],
                run.accelerator,
                references=pairs[split]["references"],
                tokenizer=tokenizer,
                metric=ready.metric,
                generation=generation_arguments(config.eval, config.data),
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
            loaders,
            window=run.best_window(score),
            write_outputs=lambda found: write_samples(run.folder, found, pairs, config.eval.num_samples),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    return run_recipe(train, Config, argv)


if __name__ == "__main__":
    leave(main())
