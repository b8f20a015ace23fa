"""Settings that only models which read one text and write another have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from swaft.options import Count, Option, Range, ShareBelowOne, WholeNumber
from swaft.training.config.schema import (
    AnyModelConfig,
    EvalConfig,
    Fault,
    RecipeConfig,
    RowsConfig,
    TrainConfig,
)

NO_NEW_TOKENIZER = (
    "is the size of a new tokenizer, and none is trained where model.model_name_or_path or model.tokenizer_name "
    "bring one; remove it"
)


@dataclass(kw_only=True)
class Seq2SeqModelConfig(AnyModelConfig):
    """Which encoder-decoder to fine-tune, or what a new one looks like."""

    model_name_or_path: str | None = None
    """Hub id or folder of the pretrained encoder-decoder (T5, BART, mBART, Pegasus, Marian, NLLB); null with
    `config`."""
    config: dict[str, Any] | None = None
    """A new model to train from random weights, in place of a pretrained one: entries of its transformers
    configuration, `model_type` (t5, bart, ...) among them; the others keep the defaults of that type."""
    vocab_size: Annotated[int, Range(low=300)] | None = None
    """Tokens of the tokenizer that is trained on the training rows for a new model without
    `tokenizer_name`; null: 4096."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; null: the model's own, or a new one for a new model."""

    @property
    def described(self) -> dict[str, Any] | None:
        """Entries of the transformers configuration of a new model; None: the model is a pretrained one."""
        return self.config

    @property
    def brings_tokenizer(self) -> bool:
        """Whether there is a tokenizer; else a new one is trained for the new model."""
        return self.config is None or self.tokenizer_name is not None

    @property
    def most_tokens(self) -> int:
        """Tokens of a new tokenizer at most."""
        return self.vocab_size or 4096

    def conflicts(self) -> Iterator[Fault]:
        """Besides: none or several models, and what a new one cannot be."""
        yield from super().conflicts()
        new, named = self.config, self.model_name_or_path
        if new is None and named is None:
            advice = "set it to a pretrained encoder-decoder, or model.config for a new model"
            yield "model_name_or_path", f"no model named; {advice}"
        if self.vocab_size is not None and self.brings_tokenizer:
            yield "vocab_size", NO_NEW_TOKENIZER
        if new is None:
            return
        if self.use_peft:
            message = "adapters change a pretrained model, and model.config describes a new one"
            yield "use_peft", f"{message}; set model.use_peft=false"
        if named is not None:
            message = f"describes a new model, but model.model_name_or_path={named} names a pretrained one"
            yield "config", f"{message}; keep one (null takes the other back)"
        if "model_type" not in new:
            yield "config", "has no model_type; expected one of an encoder-decoder, t5 say"
        if Option.of(Count).fault(size := new.get("vocab_size", 1)):
            expected = "expected 1 or more, or nothing: then it is the tokenizer's"
            yield "config", f"vocab_size is {size!r}; {expected}"


@dataclass(kw_only=True)
class Seq2SeqDataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which columns of them."""

    source_column: str | None = None
    """Column with the text to read; null: both columns are found by their usual names (document and summary,
    article and highlights, ...). A language of the column `translation` will do too."""
    target_column: str | None = None
    """Column with the text to write; set it with `source_column` or not at all."""
    source_lang: str | None = None
    """Language to read: a key of the column `translation`, and for a model of many languages its code (en_XX,
    eng_Latn). A code finds the key before its `_`; for other keys name `source_column` as well."""
    target_lang: str | None = None
    """Language to write."""
    source_prefix: str = ""
    """Put before every source. T5 was told its task so: "summarize: ", "translate English to French: "."""
    max_source_length: Annotated[int, Range(low=2)] = 512
    """Longest source in tokens, longer texts are cut. 512 is what T5 was pretrained with."""
    max_target_length: Annotated[int, Range(low=2)] = 128
    """Longest target in tokens, longer texts are cut. 128 holds nearly every summary of news."""

    def conflicts(self) -> Iterator[Fault]:
        """Besides: a column or a language without its counterpart."""
        yield from super().conflicts()
        for pair in (("source_column", "target_column"), ("source_lang", "target_lang")):
            missing = [name for name in pair if getattr(self, name) is None]
            if len(missing) == 1:
                yield missing[0], "is not set, but its counterpart is; set both or none"


@dataclass(kw_only=True)
class Seq2SeqTrainConfig(TrainConfig):
    """How to optimise, and where the results go."""

    label_smoothing_factor: ShareBelowOne = 0.0
    """Share of each target token spread over the whole vocabulary, in training only; the evaluation loss is
    always the plain one. 0: off. 0.1 is usual for training translation from scratch."""


@dataclass(kw_only=True)
class Seq2SeqEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure on generated texts: rouge, rougeL_coco, bleu, chrf, bleu_chrf or bleu_rouge; auto: the
    usual one of the task, else bleu_chrf for translations and rouge for the rest."""
    predict_with_generate: bool = True
    """Generate a text for every row and score it. false: measure the loss alone, which is much faster."""
    num_beams: Count | None = None
    """Width of the beam search, 1: the likeliest token each time; null: as the model's generation settings say
    (1 for most)."""
    max_new_tokens: Count | None = None
    """Longest text to generate, in tokens; null: `data.max_target_length`."""
    num_samples: WholeNumber = 20
    """Rows of each split whose generated texts are kept in the run folder, last beside averaged weights."""

    tasks: ClassVar = ("generation",)

    def conflicts(self) -> Iterator[Fault]:
        """Besides: what is said about texts that are not generated."""
        yield from super().conflicts()
        for name, default in {"metric": "auto", "num_beams": None, "max_new_tokens": None}.items():
            if not self.predict_with_generate and (value := getattr(self, name)) != default:
                reason = "is about generated texts, and eval.predict_with_generate=false generates none"
                yield name, f"{value} {reason}; remove one of the two"


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(RecipeConfig):
    """Everything `recipes/seq2seq.py` needs."""

    model: Seq2SeqModelConfig = field(default_factory=Seq2SeqModelConfig)
    data: Seq2SeqDataConfig = field(default_factory=Seq2SeqDataConfig)
    train: Seq2SeqTrainConfig
    eval: Seq2SeqEvalConfig = field(default_factory=Seq2SeqEvalConfig)
