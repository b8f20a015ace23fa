"""Finds what is wrong with one section of a configuration, whatever the others say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from swaft.errors import ConfigError
from swaft.training.config.question_answering import (
    QuestionAnsweringDataConfig,
    QuestionAnsweringEvalConfig,
)
from swaft.training.config.schema import (
    AdapterConfig,
    AveragingConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    NoiseConfig,
    RowsConfig,
    TrackConfig,
    TrainConfig,
)
from swaft.training.config.seq2seq import (
    Seq2SeqDataConfig,
    Seq2SeqEvalConfig,
    Seq2SeqModelConfig,
    Seq2SeqTrainConfig,
)
from swaft.training.config.values import DELIMITERS, not_allowed, split_names
from swaft.training.metrics.classification import METRIC_NAMES
from swaft.training.metrics.names import refuse_unfit

# What accelerate calls the trackers it can write to.
TRACKERS = (
    "none",
    "all",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)

LONGEST_TIMEOUT = 365 * 24 * 3600
"""Seconds. torch counts a timeout in nanoseconds, of which 64 bits hold no more than three centuries."""


def _check_rows(data: RowsConfig) -> list[str]:
    problems = []
    sources = {name: getattr(data, name) for name in ("task_name", "dataset_name", "train_file")}
    named = [f"data.{name}={value}" for name, value in sources.items() if value is not None]
    if not named:
        problems.append(
            "data.task_name: no rows named; set data.task_name, data.dataset_name or data.train_file"
        )
    if len(named) > 1:
        problems.append(f"data.task_name: {' and '.join(named)} each name the rows; keep one")
    for name in ("validation_file", "test_file"):
        if getattr(data, name) is not None and data.train_file is None:
            problems.append(f"data.{name}: is used beside data.train_file, which is not set")
    if data.dataset_config_name is not None and data.dataset_name is None:
        problems.append("data.dataset_config_name: is a configuration of data.dataset_name, which is not set")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        problems += _at_least(f"data.{name}", getattr(data, name), 1)
    return problems + _check_delimiter(data) + _check_fraction(data)


def _check_delimiter(data: RowsConfig) -> list[str]:
    if data.delimiter is None:
        return []
    character = DELIMITERS.get(data.delimiter, data.delimiter)
    if len(character) != 1 or character in '"\r\n':
        return [f"data.delimiter: {data.delimiter!r} is not one character; expected one such as ; or tab"]
    files = (data.train_file, data.validation_file, data.test_file)
    is_table = any((file or "").lower().endswith((".csv", ".tsv")) for file in files)
    if not is_table and data.dataset_name is None:  # of which it is seen when it is read
        return ["data.delimiter: is about csv and tsv files, and data.train_file names none; remove it"]
    return []


def _check_fraction(data: RowsConfig) -> list[str]:
    fraction = data.validation_fraction
    if fraction is None:
        return []
    if not 0 < fraction < 1:
        return [
            f"data.validation_fraction: {fraction} is outside (0, 1); 0.1 is a tenth of the training rows"
        ]
    if data.validation_file is not None:
        return ["data.validation_fraction: data.validation_file names the validation rows already; keep one"]
    return []


def _check_data(data: DataConfig) -> list[str]:
    problems = _check_rows(data)
    if data.text_pair_column is not None and data.text_column is None:
        problems.append("data.text_pair_column: is set without data.text_column; set both")
    problems += _check_languages(data)
    return problems + _at_least("data.max_seq_length", data.max_seq_length, 1)


def _check_languages(data: DataConfig) -> list[str]:
    if data.eval_languages is None:
        return []
    languages = split_names(data.eval_languages)
    if not all(languages) or len(set(languages)) < len(languages):
        return [
            f"data.eval_languages: '{data.eval_languages}' holds an empty or a repeated name; write each language "
            "once, with commas between them (de,fr)"
        ]
    if data.dataset_config_name in languages:
        return [
            f"data.eval_languages: {data.dataset_config_name} is data.dataset_config_name, whose validation and "
            "test rows are evaluated anyway; remove it from the languages"
        ]
    return []


def _check_train(train: TrainConfig) -> list[str]:
    problems = []
    if not train.output_dir:
        problems.append("train.output_dir: is empty; name the folder of the run")
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "ddp_timeout")
    for name in counts:
        problems += _at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("save_steps", "save_total_limit"):
        if getattr(train, name) is not None:
            problems += _at_least(f"train.{name}", getattr(train, name), 1)
    if train.ddp_timeout > LONGEST_TIMEOUT:
        problems.append(
            f"train.ddp_timeout: {train.ddp_timeout} seconds is over a year; expected {LONGEST_TIMEOUT} at most"
        )
    for name in ("weight_decay", "max_grad_norm", "seed", "dataloader_num_workers", "warmup_steps"):
        problems += _at_least(f"train.{name}", getattr(train, name), 0)
    for name in ("learning_rate", "num_train_epochs", "adam_epsilon"):
        problems += _positive(f"train.{name}", getattr(train, name))
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(train, name) < 1:
            problems.append(f"train.{name}: {getattr(train, name)} is outside [0, 1)")
    if train.max_steps != -1 and train.max_steps < 1:
        problems.append(
            f"train.max_steps: {train.max_steps} is neither a number of steps nor -1 (as epochs say)"
        )
    if isinstance(train.warmup_steps, float) and train.warmup_steps >= 1:
        problems.append(
            f"train.warmup_steps: {train.warmup_steps} is a fraction of the run and has to be below 1; "
            "for a number of steps write it without a decimal point"
        )
    return problems


def _check_averaging_section(averaging: AveragingConfig) -> list[str]:
    problems = _at_least("averaging.every", averaging.every, 1)
    start = averaging.start
    if isinstance(start, float) and not 0 <= start <= 1:
        problems.append(
            f"averaging.start: {start} is a fraction of the run and has to be between 0.0 and 1.0; "
            "for an optimizer step write it without a decimal point"
        )
    elif start < 0:
        problems.append(f"averaging.start: step {start} is before the run; use 0 or more")
    if averaging.decay is not None and not 0 < averaging.decay < 1:
        problems.append(f"averaging.decay: {averaging.decay} is outside (0, 1); 0.999 is usual")
    half_life = averaging.half_life
    if isinstance(half_life, float) and not 0 < half_life <= 1:
        problems.append(
            f"averaging.half_life: {half_life} is a fraction of the run and has to be above 0.0 and at most 1.0; "
            "for optimizer steps write it without a decimal point"
        )
    elif isinstance(half_life, int):
        problems += _at_least("averaging.half_life", half_life, 1)
    for name in ("ema_power", "bias_power", "multiplier"):
        problems += _at_least(f"averaging.{name}", getattr(averaging, name), 0)
    for name in ("lag", "snapshots", "threads"):
        problems += _at_least(f"averaging.{name}", getattr(averaging, name), 1)
    for name in ("last", "blocks"):
        problems += _at_least(f"averaging.{name}", getattr(averaging, name), 2)
    if not -1 <= averaging.blend <= 2:
        problems.append(f"averaging.blend: {averaging.blend} is outside [-1, 2]; 1 is the average")
    elif averaging.rule == "none" and (averaging.blend != 1 or averaging.search_blend):
        name = "search_blend" if averaging.search_blend else "blend"
        problems.append(
            f"averaging.{name}: there is no average to blend with; set averaging.rule, or remove it"
        )
    elif averaging.blend != 1 and averaging.search_blend:
        problems.append("averaging.blend: is chosen by averaging.search_blend; remove one of the two")
    elif averaging.blend != 1 and averaging.rule == "windows":
        problems.append(
            "averaging.blend: with averaging.rule=windows a window is chosen by the score of its mean; set "
            "averaging.search_blend=true to choose the blend after it, or remove it"
        )
    return problems


def _check_noise(noise: NoiseConfig) -> list[str]:
    problems = _at_least("noise.weight", noise.weight, 0)
    return problems + _at_least("noise.sigma", noise.sigma, 0)


def _check_batches(evaluation: EvalConfig) -> list[str]:
    problems = _at_least("eval.per_device_eval_batch_size", evaluation.per_device_eval_batch_size, 1)
    problems += _at_least("eval.eval_steps", evaluation.eval_steps, 1)
    return problems + _check_best(evaluation)


def _check_best(evaluation: EvalConfig) -> list[str]:
    patience, threshold = evaluation.early_stopping_patience, evaluation.early_stopping_threshold
    problems = _at_least("eval.early_stopping_patience", patience, 1)
    problems += _at_least("eval.early_stopping_threshold", threshold, 0)
    asked = {"keep_best": evaluation.keep_best != "none", "early_stopping_patience": patience is not None}
    problems += [
        f"eval.{name}: needs evaluations while training, and eval.eval_steps is null; set it"
        for name, is_asked in asked.items()
        if is_asked and evaluation.eval_steps is None
    ]
    if threshold and patience is None:
        problems.append(
            f"eval.early_stopping_threshold: {threshold} is used with eval.early_stopping_patience, which is "
            "null; set it, or remove the threshold"
        )
    return problems


def _check_adapter(model: AdapterConfig) -> list[str]:
    problems = _at_least("model.lora_r", model.lora_r, 1) + _at_least("model.lora_alpha", model.lora_alpha, 1)
    if not 0 <= model.lora_dropout < 1:
        problems.append(f"model.lora_dropout: {model.lora_dropout} is outside [0, 1)")
    names = model.lora_target_modules
    if names is not None and not all(split_names(names)):
        problems.append(
            f"model.lora_target_modules: '{names}' holds an empty name; write names with commas "
            "between them (query,value), or all-linear"
        )
    if not model.use_peft:
        problems += [
            f"model.{each.name}: {getattr(model, each.name)} is about LoRA, and model.use_peft=false; "
            "set model.use_peft=true, or remove it"
            for each in fields(AdapterConfig)
            if getattr(model, each.name) != each.default
        ]
    return problems


def _check_eval(evaluation: EvalConfig) -> list[str]:
    problems = _check_batches(evaluation)
    names = ("auto", *METRIC_NAMES)
    if evaluation.metric not in names:
        problems.append(f"eval.metric: {not_allowed(evaluation.metric, names)}")
    return problems


def _check_seq2seq_model(model: Seq2SeqModelConfig) -> list[str]:
    problems = _check_adapter(model)
    if model.use_peft and model.config is not None:
        problems.append(
            "model.use_peft: adapters change a pretrained model, and model.config describes a new one; "
            "set model.use_peft=false"
        )
    if model.model_name_or_path is None and model.config is None:
        problems.append(
            "model.model_name_or_path: no model named; set it to a pretrained encoder-decoder, or model.config for "
            "a new model"
        )
    if model.model_name_or_path is not None and model.config is not None:
        problems.append(
            f"model.config: describes a new model, but model.model_name_or_path={model.model_name_or_path} names a "
            "pretrained one; keep one (null takes the other back)"
        )
    if model.config is not None and "model_type" not in model.config:
        problems.append("model.config: has no model_type; expected one of an encoder-decoder, t5 say")
    problems += _check_embeddings(model)
    if model.vocab_size is not None:
        problems += _at_least("model.vocab_size", model.vocab_size, 300)
        if model.config is None or model.tokenizer_name is not None:
            problems.append(
                "model.vocab_size: is the size of a new tokenizer, and none is trained where "
                "model.model_name_or_path or model.tokenizer_name bring one; remove it"
            )
    return problems


def _check_embeddings(model: Seq2SeqModelConfig) -> list[str]:
    size = (model.config or {}).get("vocab_size", 1)
    if type(size) is int and size >= 1:
        return []
    return [
        f"model.config: vocab_size is {size!r}; expected 1 or more, or nothing: then it is the tokenizer's"
    ]


def _check_seq2seq_data(data: Seq2SeqDataConfig) -> list[str]:
    problems = _check_rows(data)
    for one, other in (("source_column", "target_column"), ("source_lang", "target_lang")):
        if (getattr(data, one) is None) != (getattr(data, other) is None):
            missing = one if getattr(data, one) is None else other
            problems.append(f"data.{missing}: is not set, but its counterpart is; set both or none")
    for name in ("max_source_length", "max_target_length"):
        problems += _at_least(f"data.{name}", getattr(data, name), 2)
    return problems


def _check_seq2seq_train(train: Seq2SeqTrainConfig) -> list[str]:
    problems = _check_train(train)
    if not 0 <= train.label_smoothing_factor < 1:
        problems.append(f"train.label_smoothing_factor: {train.label_smoothing_factor} is outside [0, 1)")
    return problems


def _check_seq2seq_eval(evaluation: Seq2SeqEvalConfig) -> list[str]:
    problems = _check_batches(evaluation)
    for name in ("num_beams", "max_new_tokens"):
        problems += _at_least(f"eval.{name}", getattr(evaluation, name), 1)
    problems += _at_least("eval.num_samples", evaluation.num_samples, 0)
    problems += _unfit_metric(evaluation.metric, "generation")
    if not evaluation.predict_with_generate:
        unused = {"metric": "auto", "num_beams": None, "max_new_tokens": None}
        problems += [
            f"eval.{name}: {getattr(evaluation, name)} is about generated texts, and "
            "eval.predict_with_generate=false generates none; remove one of the two"
            for name, default in unused.items()
            if getattr(evaluation, name) != default
        ]
    return problems


def _check_questions(data: QuestionAnsweringDataConfig) -> list[str]:
    problems = _check_rows(data) + _at_least("data.max_seq_length", data.max_seq_length, 8)
    problems += _at_least("data.doc_stride", data.doc_stride, 0)
    if data.doc_stride >= data.max_seq_length:
        problems.append(
            f"data.doc_stride: windows of data.max_seq_length={data.max_seq_length} tokens cannot share "
            f"{data.doc_stride} of them and go on; expected less, a third of the length say"
        )
    return problems


def _check_answers(evaluation: QuestionAnsweringEvalConfig) -> list[str]:
    problems = _check_batches(evaluation)
    problems += _at_least("eval.max_answer_length", evaluation.max_answer_length, 1)
    problems += _at_least("eval.num_samples", evaluation.num_samples, 0)
    threshold = evaluation.null_score_diff_threshold
    if not math.isfinite(threshold):
        problems.append(f"eval.null_score_diff_threshold: {threshold} is not a finite number")
    return problems + _unfit_metric(evaluation.metric, "question answering")


def _unfit_metric(name: str, task: str) -> list[str]:
    try:
        if name != "auto":
            refuse_unfit(name, task)
    except ConfigError as error:
        return error.problems
    return []


def _check_track(track: TrackConfig) -> list[str]:
    if track.report_to in TRACKERS:
        return []
    return [f"track.report_to: {not_allowed(track.report_to, TRACKERS)}"]


def _at_least(name: str, value: float | None, least: int) -> list[str]:
    if value is None or (math.isfinite(value) and value >= least):
        return []
    return [f"{name}: {_fault(value)}; expected {least} or more"]


def _positive(name: str, value: float) -> list[str]:
    return [] if math.isfinite(value) and value > 0 else [f"{name}: {_fault(value)}; expected more than 0"]


def _fault(value: float) -> str:
    return f"{value} is too small" if math.isfinite(value) or value < 0 else f"{value} is not a finite number"


SECTION_CHECKS: dict[type, Callable[[Any], list[str]]] = {
    ModelConfig: _check_adapter,
    DataConfig: _check_data,
    TrainConfig: _check_train,
    AveragingConfig: _check_averaging_section,
    NoiseConfig: _check_noise,
    EvalConfig: _check_eval,
    QuestionAnsweringDataConfig: _check_questions,
    QuestionAnsweringEvalConfig: _check_answers,
    Seq2SeqModelConfig: _check_seq2seq_model,
    Seq2SeqDataConfig: _check_seq2seq_data,
    Seq2SeqTrainConfig: _check_seq2seq_train,
    Seq2SeqEvalConfig: _check_seq2seq_eval,
    TrackConfig: _check_track,
}
