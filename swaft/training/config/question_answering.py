"""Settings that only models which find answers in a text have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from swaft.options import Count, Range, WholeNumber
from swaft.training.config.schema import EvalConfig, Fault, ModelConfig, RecipeConfig, RowsConfig


@dataclass(kw_only=True)
class QuestionAnsweringDataConfig(RowsConfig):
    """Which questions to train and evaluate on, and how their contexts are cut into windows.

    Rows have SQuAD's columns: id, question, context, and answers (text, answer_start).
    """

    max_seq_length: Annotated[int, Range(low=8)] = 384
    """Tokens of a window: the question, and as much of the context as fits beside it. 384 is what BERT was
    fine-tuned with."""
    doc_stride: WholeNumber = 128
    """Tokens of context that a window shares with the next one, so that no answer is cut by both."""
    version_2_with_negative: bool | None = None
    """Whether a question may have no answer (SQuAD 2.0); null: it may where some question has none. false with
    such a question is an error."""

    def conflicts(self) -> Iterator[Fault]:
        """Besides: windows that do not get on."""
        yield from super().conflicts()
        if self.doc_stride >= self.max_seq_length:
            message = (
                f"windows of data.max_seq_length={self.max_seq_length} tokens cannot share {self.doc_stride}"
            )
            yield "doc_stride", f"{message} of them and move on; expected less, a third of the length say"


@dataclass(kw_only=True)
class QuestionAnsweringEvalConfig(EvalConfig):
    """When and how to evaluate."""

    metric: str = "auto"
    """What to measure: squad (exact_match and f1) or squad_v2 (the same, and apart for questions with and without
    an answer); auto: squad_v2 where questions may have no answer."""
    max_answer_length: Count = 30
    """Tokens of an answer at most."""
    null_score_diff_threshold: Annotated[float, Range()] = 0.0
    """How much "no answer" has to score above the best answer to be given; used where questions may have none."""
    num_samples: WholeNumber = 20
    """Questions of each split whose answers are kept in the run folder, last beside averaged weights, to read."""

    tasks: ClassVar = ("question answering",)


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig(RecipeConfig):
    """Everything `recipes/question_answering.py` needs."""

    model: ModelConfig
    data: QuestionAnsweringDataConfig = field(default_factory=QuestionAnsweringDataConfig)
    eval: QuestionAnsweringEvalConfig = field(default_factory=QuestionAnsweringEvalConfig)
