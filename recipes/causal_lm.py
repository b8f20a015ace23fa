"""Fine-tunes a decoder (Llama, Qwen, Gemma, GPT-2) on prompts with answers, chats or texts; averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/causal_lm.py \
        --config recipes/configs/causal_lm/smol_chat.yaml averaging.rule=ema noise.kind=r3f

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. The loss is on the answers alone. It
leaves a run folder with the last weights (final/), the averaged ones (final-averaged/), the scores of both
(summary.json), and answers that both wrote (samples-validation.jsonl, samples-test.jsonl).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset

import swaft
from swaft.averaging.rules import Readout
from swaft.errors import ConfigError
from swaft.training.checks import Prepared, Problems, start_of
from swaft.training.config import build_rule
from swaft.training.data.causal_lm import (
    CausalCollator,
    CausalColumns,
    CausalConfig,
    asked_rows,
    find_columns,
    pack,
    require_chat_template,
    tokenize_rows,
)
from swaft.training.data.sources import load_splits
from swaft.training.data.texts import read_as_text, report_special_tokens, require_length, values
from swaft.training.evaluation.best import choose_target
from swaft.training.evaluation.evaluate import Evaluation, write_samples
from swaft.training.evaluation.generation import evaluate_answers_given, write_answers
from swaft.training.launch.failure import leave
from swaft.training.models.build import build_objective, build_optimizer, build_schedule, set_learning_rate
from swaft.training.models.checks import check_model, require_embedded
from swaft.training.models.encoder_decoder import (
    check_new_model,
    decoder_config,
    load_text_model,
    new_tokenizer,
)
from swaft.training.models.pretrained import load_tokenizer, longest_text
from swaft.training.run.run import Run, run_recipe

Config = CausalConfig


class PreparedTexts(Prepared):
    """What a run needs that neither a device nor other ranks have to do with."""

    columns: CausalColumns
    datasets: dict[str, Dataset]
    """Token ids of every split; missing where a new tokenizer is to be trained."""
    metric: None = None

    @property
    def description(self) -> str:
        """What is learnt, in words."""
        return "answers to chats" if self.columns.messages else "continuing texts"


def prepare(config: CausalConfig, problems: Problems) -> PreparedTexts:
    """Find and check everything that needs no device and no other rank; what is wrong goes on the list."""
    ready = PreparedTexts()
    with problems:  # what is wrong in a block ends it, and those that need something of it are left out
        require_steps(config)
    with problems:
        ready.columns = find_columns(load_splits(config.data), config.data)
        ready.rows = ready.columns.rows
    with problems:
        ready.model_config = decoder_config(config.model)
    with problems:
        ready.tokenizer = load_tokenizer(config.model) if config.model.brings_tokenizer else None
        if ready.tokenizer is not None:
            read_as_text(ready.tokenizer, config.data.split_special_tokens)
    check_model(ready, config, problems)
    with problems:
        if ready.tokenizer is not None:
            CausalCollator(ready.tokenizer)
            if ready.columns.messages is None:
                report_special_tokens(ready.rows, ready.columns.names, ready.tokenizer)
    with problems:
        require_chat_template(ready.tokenizer, ready.columns)
        if ready.tokenizer is not None:
            ready.datasets = tokenized(ready.columns, ready.tokenizer, config)
            require_embedded(ready.datasets.values(), config.model, ready.model_config)
    with problems:
        if ready.tokenizer is not None:
            most = longest_text(ready.model_config, ready.tokenizer)
            require_length("data.max_length", config.data.max_length, most)
    with problems:
        check_new_model(config.model, ready.tokenizer)
    with problems:
        ready.objective = build_objective(
            config.noise, seed=config.train.seed, label_smoothing=config.train.label_smoothing_factor
        )
    with problems:
        ready.rule = build_rule(config.averaging)
    with problems:
        ready.target = choose_target(config.eval, None, ready.rows, config.averaging)
    return ready


def require_steps(config: CausalConfig) -> None:
    """Refuse to pack without a number of steps: how many rows are left is known once they are packed."""
    if config.data.packing and config.train.max_steps < 1:
        raise ConfigError(
            "data.packing: how many rows are left is known once they are packed; set train.max_steps"
        )


def tokenized(columns: CausalColumns, tokenizer: Any, config: CausalConfig) -> dict[str, Dataset]:
    """Return every split as token ids, of which the answers are learnt."""
    return {name: tokenize_rows(rows, tokenizer, columns, config.data) for name, rows in columns.rows.items()}


def texts_of(columns: CausalColumns) -> Iterator[str]:
    """Yield every text of the training rows, for a new tokenizer."""
    for name in columns.names:
        yield from values(columns.rows["train"], name)


def train(config: CausalConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found, all of it, before there is one.
    ready, start = start_of(config, prepare)
    columns, objective = ready.columns, ready.objective

    with Run.start(config, start.engine) as run:
        # Data: every split that is there, as token ids, of which the answers are learnt.
        tokenizer = ready.tokenizer
        if tokenizer is None:
            tokenizer = new_tokenizer(config.model, run.accelerator, texts=lambda: texts_of(columns))
            read_as_text(tokenizer, config.data.split_special_tokens)
            report_special_tokens(columns.rows, columns.names, tokenizer)
            ready.datasets = tokenized(columns, tokenizer, config)
        datasets = ready.datasets
        if config.data.packing:
            datasets["train"] = pack(datasets["train"], config.data.max_length)

        # Model: the pretrained one, or a new one of random weights, the same on every rank.
        with run.loading():
            model = load_text_model(config, ready.model_config, tokenizer)
        objective.prepare_model(model)
        collate = CausalCollator(tokenizer)

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
            return evaluate_answers_given(
                model, loaders[split], run.accelerator, num_rows=len(datasets[split])
            )

        def score_both(
            split: str, readout: Readout | None = None, measure: Callable[[str], Evaluation] = score
        ) -> dict[str, Evaluation]:
            found = {"last": measure(split)}
            if averager and averager.num_averaged:
                with averager.swapped_in(readout):
                    found["averaged"] = measure(split)
            return found

        # Samples: the first rows of every split, answered by both.
        num_samples = config.eval.num_samples
        asked = {name: asked_rows(datasets[name], num_samples, tokenizer) for name in loaders}

        def answer(split: str) -> Evaluation:
            return write_answers(
                model,
                asked[split],
                run.accelerator,
                tokenizer=tokenizer,
                data=config.data,
                evaluation=config.eval,
            )

        def write_outputs(_: Any) -> None:
            found = {split: score_both(split, run.readout, answer) for split in loaders}
            write_samples(run.folder, found, asked, num_samples, columns=("prompt", "answer"))

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

        run.finish(score_both, loaders, window=run.best_window(score), write_outputs=write_outputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    return run_recipe(train, Config, argv)


if __name__ == "__main__":
    leave(main())
