"""Settings that only models which continue a text have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from swaft.options import Count, Range, WholeNumber
from swaft.training.config.schema import EvalConfig, Fault, RecipeConfig, RowsConfig
from swaft.training.config.seq2seq import Seq2SeqModelConfig, Seq2SeqTrainConfig


@dataclass(kw_only=True)
class CausalDataConfig(RowsConfig):
    """Which rows to train and evaluate on, and which columns of them."""

    prompt_column: str | None = None
    """Column with the text that is given; null: both columns are found by their usual names (prompt and completion,
    instruction and output, question and answer, ...), and without them the messages or the text."""
    answer_column: str | None = None
    """Column with the text to learn; set it with `prompt_column`, or alone for texts without a prompt."""
    messages_column: str | None = None
    """Column with chats: lists of messages with a role and a content, written by the tokenizer's chat template. The
    answers of the assistant are learnt."""
    prompt_prefix: str = ""
    """Put before every prompt."""
    prompt_suffix: str = ""
    """Put between every prompt and its answer: a line break, say."""
    max_length: Annotated[int, Range(low=2)] = 512
    """Longest row in tokens, prompt and answer together. An answer is cut to what its prompt leaves, half of
    it at least, and of a longer prompt the beginning is left out; chats are cut at their end."""
    packing: bool = False
    """Put several rows into one of `max_length` tokens, each with positions of its own and without sight of the
    others. Off; on it saves the padding of short rows."""

    def conflicts(self) -> Iterator[Fault]:
        """Besides: columns of texts beside those of chats."""
        yield from super().conflicts()
        if self.prompt_column is not None and self.answer_column is None:
            yield "prompt_column", "is set without data.answer_column; set both"
        if self.messages_column is not None and self.answer_column is not None:
            yield "messages_column", "names chats, and data.answer_column texts; keep one"


@dataclass(kw_only=True)
class CausalEvalConfig(EvalConfig):
    """When and how to evaluate: by the loss, the perplexity and the accuracy of the tokens that are learnt."""

    metric: str = "auto"
    """There is no other choice: the loss."""
    num_samples: WholeNumber = 20
    """Rows of each split whose last answer is written by last and averaged weights at the end of the run, and kept
    in the run folder; 0: none."""
    max_new_tokens: Count = 64
    """Longest of those answers, in tokens. It is shorter where a prompt leaves less of `data.max_length`."""

    tasks: ClassVar = ()


@dataclass(frozen=True, kw_only=True)
class CausalConfig(RecipeConfig):
    """Everything `recipes/causal_lm.py` needs."""

    model: Seq2SeqModelConfig = field(default_factory=Seq2SeqModelConfig)
    data: CausalDataConfig = field(default_factory=CausalDataConfig)
    train: Seq2SeqTrainConfig
    eval: CausalEvalConfig = field(default_factory=CausalEvalConfig)
