"""Fine-tunes a pretrained encoder-decoder to write texts (summaries, translations), and averages its weights.

    accelerate launch --config_file launch/accelerate/zero3.yaml recipes/seq2seq.py \
        --config recipes/configs/seq2seq/scitldr.yaml averaging.rule=swa noise.kind=r3f

The same file runs in one process, under DDP, DeepSpeed ZeRO 0 to 3 and FSDP2. It leaves a run folder with the last
weights (final/), the averaged ones (final-averaged/), the scores of both (summary.json), and texts that both
wrote (samples-validation.jsonl, samples-test.jsonl).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from swaft.config import Seq2SeqConfig, load_config
from swaft.data import (
    Seq2SeqCollator,
    find_pairs,
    length_grouped_sampler,
    load_splits,
    read_pairs,
    tokenize_pairs,
)
from swaft.metrics import get_generation_metric
from swaft.training.accelerator import build_accelerator, whole_model_loading
from swaft.training.build import build_objective, build_rule
from swaft.training.encoder_decoder import (
    encoder_decoder_config,
    encoder_decoder_tokenizer,
    load_encoder_decoder,
    longest_input,
)
from swaft.training.evaluate import Evaluation
from swaft.training.failure import leave, run_and_report
from swaft.training.fine_tune import Target, fine_tune
from swaft.training.generation import evaluate_texts, generation_arguments, report_lengths, write_samples
from swaft.training.pretrained import hidden_size
from swaft.training.progress import setup_logging
from swaft.training.run_folder import RunFolder


def run(config: Seq2SeqConfig) -> None:
    """Fine-tune, evaluate and save."""
    # What can be wrong without any process group is found before there is one.
    model_config = encoder_decoder_config(config.model)
    objective = build_objective(
        config.noise, seed=config.train.seed, label_smoothing=config.train.label_smoothing_factor
    )
    rule = build_rule(config.averaging)
    metric = None
    if config.eval.predict_with_generate:
        metric = get_generation_metric(config.eval.metric, task_name=config.data.task_name)
    accelerator = build_accelerator(config, hidden_size=hidden_size(model_config))
    folder = RunFolder.create(config.train.output_dir, accelerator)

    # Data: every split that is there, as pairs of texts with all their references, and as token ids.
    splits = load_splits(config.data)
    columns = find_pairs(
        splits,
        source_column=config.data.source_column,
        target_column=config.data.target_column,
        source_lang=config.data.source_lang,
        target_lang=config.data.target_lang,
    )
    pairs = {name: read_pairs(split, name, columns) for name, split in splits.items()}
    tokenizer = encoder_decoder_tokenizer(
        config.model,
        accelerator,
        texts=lambda: chain(pairs["train"]["source"], pairs["train"]["target"]),
    )
    datasets = {
        name: tokenize_pairs(
            rows,
            tokenizer,
            max_source_length=config.data.max_source_length,
            max_target_length=config.data.max_target_length,
            source_prefix=config.data.source_prefix,
            model_max_length=longest_input(model_config),
        )
        for name, rows in pairs.items()
    }
    report_lengths(datasets["train"], config.data)
    sampler = None
    if config.train.group_by_length:
        sampler = length_grouped_sampler(
            datasets["train"]["source_length"],
            batch_size=config.train.per_device_train_batch_size * accelerator.num_processes,
            seed=config.train.seed,
        )

    # Model: the pretrained one, or a new one of random weights, the same on every rank.
    with whole_model_loading(accelerator):
        model = load_encoder_decoder(
            config.model,
            model_config,
            tokenizer,
            seed=config.train.seed,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
    objective.prepare_model(model)

    def score(model: nn.Module, loader: DataLoader[Any], split: str) -> Evaluation:
        return evaluate_texts(
            model,
            loader,
            accelerator,
            references=pairs[split]["references"],
            tokenizer=tokenizer,
            metric=metric,
            generation=generation_arguments(config.eval, config.data),
        )

    evaluations = fine_tune(
        config,
        accelerator,
        folder,
        task="writing texts" if metric is None else f"writing texts, scored by {metric.name}",
        model=model,
        tokenizer=tokenizer,
        objective=objective,
        rule=rule,
        datasets=datasets,
        collate=Seq2SeqCollator(tokenizer),
        evaluate=score,
        target=Target(score=metric.primary) if metric else Target(score="loss", better=min),
        sampler=sampler,
    )
    write_samples(folder, evaluations, pairs, config.eval.num_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe with the given arguments (default: the command line's); return the exit code."""
    setup_logging()
    return run_and_report(lambda: run(load_config(Seq2SeqConfig, sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    leave(main())
