"""Loss between the last and the averaged weights of a recipe's finished run, and around them, for its page.

Both models are read from the run folder, and scored on validation rows in the same way as by the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from swaft.errors import ConfigError
from swaft.report.landscape import SEED, loss_surface, write_losses
from swaft.report.runs import config_class, setting_values
from swaft.soup.huggingface import ADAPTER_CONFIG
from swaft.training.config import AnyModelConfig, ModelConfig, load_config
from swaft.training.data.causal_lm import CausalCollator, CausalConfig, find_columns, tokenize_rows
from swaft.training.data.classification import ClassificationConfig, describe_task, tokenize
from swaft.training.data.loaders import Collate, loader_of
from swaft.training.data.question_answering import (
    QuestionAnsweringConfig,
    check_questions,
    may_have_no_answer,
    tokenize_questions,
)
from swaft.training.data.seq2seq import (
    Seq2SeqConfig,
    Seq2SeqModelConfig,
    find_pairs,
    read_pairs,
    tokenize_pairs,
)
from swaft.training.data.sources import load_splits
from swaft.training.data.texts import Collator, read_as_text
from swaft.training.evaluation.answering import AnswerSearch, evaluate_answers, get_question_metric
from swaft.training.evaluation.evaluate import Evaluation, evaluate_answers_given, evaluate_classes
from swaft.training.evaluation.generation import evaluate_texts
from swaft.training.metrics import get_metric
from swaft.training.models.classes import describe_labels, fit_head
from swaft.training.models.pretrained import load_model_config, load_tokenizer, load_with_head
from swaft.training.models.special_tokens import one_length, whole_windows
from swaft.training.models.text_generation import (
    decoder_config,
    encoder_decoder_config,
    load_text_model,
    set_languages,
)

REASONS = {
    "final": "it has not ended, or is not a recipe's. In a Trainer's script, call "
    "swaft.integrations.transformers.write_surface(trainer) after training",
    "final-averaged": "it averaged nothing (averaging.rule=none), or has not ended",
}
"""The folders of both weights in a run, and why one may be missing."""


@dataclass(frozen=True)
class Scoring:
    """How a recipe scores a model on its validation rows."""

    rows: Dataset
    """Validation rows, as token ids."""
    collate: Collate
    evaluate: Callable[..., Evaluation]
    """Takes a model, a loader and an accelerator."""
    load: Callable[[Any], Any]
    """Loads the model that a ``model`` section names."""
    num_rows: int
    """Rows of the data; a long one may become several of `rows`."""


def write_surface(run: Path, *, rows: int) -> None:
    """Compute the losses of a finished run and write them into its folder, as surface.json, replacing an existing
    one.

    Computed in fp32 by this process only, on its accelerator if there is one. Takes four times the memory of the
    weights.

    Args:
        run: a recipe's run folder with ``final/``, ``final-averaged/`` and config.yaml.
        rows: maximum number of validation rows, from the start.

    Raises:
        ConfigError: the folder has no averaged weights, lacks files, or has settings of another version.
        DataError: the rows cannot be found. Paths in config.yaml are relative to the current folder, as in the run.
    """
    for name, reason in REASONS.items():
        if not (run / name).is_dir():
            raise ConfigError(f"{run} has no {name}/, which --surface needs: {reason}")
    folders = [run / name for name in REASONS]
    config = _settings_of(run, rows)
    tokenizer = load_tokenizer(_whole(config.model, folders[0]))
    read_as_text(tokenizer, config.data.split_special_tokens)
    scoring = SCORING[type(config)](config, _source(config.model, folders[0]), tokenizer)
    accelerator = Accelerator(mixed_precision="no")
    last, averaged = (_load(scoring, config.model, each).to(accelerator.device) for each in folders)
    batch_size = config.eval.per_device_eval_batch_size
    loader = accelerator.prepare_data_loader(
        loader_of(
            scoring.rows, scoring.collate, batch_size=batch_size, num_workers=0, device=accelerator.device
        )
    )
    found = loss_surface(last, averaged, lambda: scoring.evaluate(last, loader, accelerator).scores["loss"])
    write_losses(run, found, rows=scoring.num_rows)


def _settings_of(run: Path, rows: int) -> Any:
    """Read config.yaml, with at most ``rows`` validation rows."""
    kind = config_class(setting_values(run))
    if kind is None:
        raise ConfigError(f"{run} has no config.yaml with settings of a recipe, which --surface needs")
    config: Any = load_config(kind, ["--config", str(run / "config.yaml")])
    rows = min(rows, config.data.max_eval_samples or rows)
    return replace(config, data=replace(config.data, max_eval_samples=rows))


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _whole(model: AnyModelConfig, folder: Path) -> AnyModelConfig:
    """Return the settings to load from a folder what is complete there: the whole model, or its tokenizer."""
    new = {"config": None, "vocab_size": None} if isinstance(model, Seq2SeqModelConfig) else {}
    return replace(model, model_name_or_path=str(folder), tokenizer_name=None, use_peft=False, **new)


def _source(model: AnyModelConfig, folder: Path) -> AnyModelConfig:
    """Return the settings of the model in a folder; for an adapter, of its base model."""
    return replace(model, use_peft=False) if _is_adapter(folder) else _whole(model, folder)


def _of(config: Any, model: AnyModelConfig) -> Any:
    """Return the settings of a run that only scores, with another ``model`` section."""
    return replace(config, model=model, train=replace(config.train, seed=SEED, gradient_checkpointing=False))


def _load(scoring: Scoring, model: AnyModelConfig, folder: Path) -> nn.Module:
    """Return the model in a folder; an adapter merged into its base, as the averaged one may have another rank.

    Raises:
        ConfigError: a copied recipe has trained a model of another class, whose head would be replaced.
    """
    loaded = scoring.load(_source(model, folder))
    if not _is_adapter(folder):
        saved, kind = loaded.config.architectures or [], type(loaded).__name__
        if kind not in saved:
            raise ConfigError(
                f"{folder} has a {' or '.join(saved) or 'model of no named class'}, but --surface scores a {kind}, "
                "as swaft's own recipe trains it; write the surface of your own recipe in its script, with "
                "loss_surface and write_losses (swaft/report/landscape.py)"
            )
        return loaded
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(loaded, str(folder))
    return adapted.merge_and_unload()


def _splits(config: Any) -> dict[str, Dataset]:
    splits = load_splits(config.data)
    if "validation" not in splits:
        raise ConfigError("the run has no validation rows, which --surface needs")
    return splits


def _classification(config: ClassificationConfig, model: ModelConfig, tokenizer: Any) -> Scoring:
    model_config = load_model_config(model)
    head = fit_head(describe_task(_splits(config), config.data), model, model_config)
    task, length = head.task, config.data.max_seq_length
    describe_labels(model_config, task, pad_token_id=tokenizer.pad_token_id)
    workers = config.data.preprocessing_num_workers
    rows = tokenize(task.rows["validation"], task, tokenizer, length, workers=workers)
    metric = get_metric("mse" if task.is_regression else "accuracy", is_regression=task.is_regression)
    return Scoring(
        rows,
        Collator(tokenizer, one_length(model_config, length)),
        partial(evaluate_classes, metric=metric, num_rows=len(rows)),
        lambda model: load_with_head(_of(config, model), model_config, has_new_head=head.is_new),
        len(rows),
    )


def _question_answering(config: QuestionAnsweringConfig, model: ModelConfig, tokenizer: Any) -> Scoring:
    model_config = load_model_config(model, num_labels=2)
    questions = check_questions(_splits(config), skip_bad_rows=config.data.skip_bad_rows)
    has_unanswerable = may_have_no_answer(questions, config.data.version_2_with_negative)
    windows = tokenize_questions(questions["validation"], tokenizer, config.data, training=False)
    length = one_length(model_config, config.data.max_seq_length)
    evaluate = partial(
        evaluate_answers,
        questions=questions["validation"],
        windows=windows,
        metric=get_question_metric(has_unanswerable=has_unanswerable),
        search=AnswerSearch(has_unanswerable=has_unanswerable, padding_side=tokenizer.padding_side),
    )
    return Scoring(
        windows,
        Collator(tokenizer, length, whole_windows(model_config)),
        evaluate,
        lambda model: load_with_head(_of(config, model), model_config),
        len(questions["validation"]),
    )


def _seq2seq(config: Seq2SeqConfig, model: Seq2SeqModelConfig, tokenizer: Any) -> Scoring:
    columns = find_pairs(_splits(config), config.data)
    pairs = read_pairs(columns.rows["validation"], "validation", columns)
    model_config = encoder_decoder_config(model)
    set_languages(tokenizer, config.data, columns)
    length = one_length(model_config, config.data.max_source_length, generates=True)
    evaluate = partial(
        evaluate_texts, references=pairs["references"], tokenizer=tokenizer, metric=None, generation={}
    )
    return Scoring(
        tokenize_pairs(pairs, tokenizer, config.data),
        Collator(tokenizer, length, whole_windows(model_config)),
        evaluate,
        lambda model: load_text_model(_of(config, model), model_config, tokenizer),
        len(pairs),
    )


def _causal_lm(config: CausalConfig, model: Seq2SeqModelConfig, tokenizer: Any) -> Scoring:
    columns = find_columns(_splits(config), config.data)
    split = {"validation": columns.rows["validation"]}
    rows = tokenize_rows(split, tokenizer, columns, config.data)["validation"]
    model_config = decoder_config(model)
    return Scoring(
        rows,
        CausalCollator(tokenizer),
        partial(evaluate_answers_given, num_rows=len(rows)),
        lambda model: load_text_model(_of(config, model), model_config, tokenizer),
        len(rows),
    )


SCORING: dict[type, Callable[[Any, Any, Any], Scoring]] = {
    ClassificationConfig: _classification,
    QuestionAnsweringConfig: _question_answering,
    Seq2SeqConfig: _seq2seq,
    CausalConfig: _causal_lm,
}
"""How each recipe scores, from its settings, those of the model to load, and the tokenizer."""
