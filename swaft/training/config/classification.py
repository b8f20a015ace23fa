"""Settings that only models which classify or score texts have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from swaft.options import Count
from swaft.training.config.schema import EvalConfig, Fault, ModelConfig, RecipeConfig, RowsConfig
from swaft.training.config.values import split_names


@dataclass(kw_only=True)
class DataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which columns of them."""

    text_column: str | None = None
    """Column with the (first) text; null: found by its usual name (sentence, sentence1, text, ...)."""
    text_pair_column: str | None = None
    """Column with the second text of a pair; null: found by its usual name, if there is one."""
    label_column: str | None = None
    """Column with the answer; null: `label` or `labels`."""
    do_regression: bool | None = None
    """Whether numbers in the label column are scores; null: fractional ones are, whole ones are class ids. false
    lets -1 be a class, too."""
    positive_label: str | None = None
    """Name of the class, of two, whose F1 `eval.metric` measures; null: the second one (of texts, by the
    alphabet), and the log says which."""
    eval_languages: str | None = None
    """Languages to evaluate on besides that of the training rows, with commas between them (de,fr,sw): each is
    evaluated at the end as a split of its own (test_de), and so is the mean over all languages. Of `dataset_name`
    they are configurations; else they are files beside those of the validation and test rows, with the language
    before the ending (test.csv, test.de.csv)."""
    max_seq_length: Count = 128
    """Longest input in tokens, longer texts are cut. 128 holds nearly every GLUE pair."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages to evaluate on besides that of the training rows."""
        return tuple(split_names(self.eval_languages)) if self.eval_languages else ()

    def conflicts(self) -> Iterator[Fault]:
        """Columns and languages that do not go together."""
        yield from super().conflicts()
        if self.text_pair_column is not None and self.text_column is None:
            yield "text_pair_column", "is set without data.text_column; set both"
        languages = [] if self.eval_languages is None else split_names(self.eval_languages)
        if not all(languages) or len(set(languages)) < len(languages):
            advice = "write each language once, with commas between them (de,fr)"
            yield "eval_languages", f"'{self.eval_languages}' holds an empty or a repeated name; {advice}"
        elif self.dataset_config_name in languages:
            reason = "is data.dataset_config_name, whose validation and test rows are evaluated anyway"
            yield "eval_languages", f"{self.dataset_config_name} {reason}; remove it from the languages"


@dataclass(kw_only=True)
class ClassificationEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure: accuracy, f1, f1_macro, accuracy_f1, matthews_correlation, pearson_spearman or mse;
    auto: the usual one of the task."""

    tasks: ClassVar = ("classification", "regression")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RecipeConfig):
    """Everything `recipes/classification.py` needs."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    eval: ClassificationEvalConfig = field(default_factory=ClassificationEvalConfig)
