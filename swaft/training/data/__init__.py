"""Rows to train on: found by name, checked, tokenized and padded."""

from swaft.training.data.answers import Answers, Candidate, find_answers
from swaft.training.data.checks import require_length
from swaft.training.data.classification import (
    Collator,
    Task,
    describe_task,
    refuse_rows_without_tokens,
    tokenize,
)
from swaft.training.data.order import length_grouped, shuffled
from swaft.training.data.question_answering import (
    WindowCollator,
    refuse_long_questions,
    require_offsets,
    tokenize_questions,
)
from swaft.training.data.questions import QuestionReport, check_questions, may_have_no_answer, right_answers
from swaft.training.data.seq2seq import (
    LengthStatistics,
    Seq2SeqCollator,
    length_statistics,
    tokenize_pairs,
)
from swaft.training.data.sources import data_folder, language_groups, load_splits
from swaft.training.data.text_pairs import PairColumns, find_pairs, read_pairs
from swaft.training.data.texts import read_as_text, report_special_tokens

__all__ = [
    "Answers",
    "Candidate",
    "Collator",
    "LengthStatistics",
    "PairColumns",
    "QuestionReport",
    "Seq2SeqCollator",
    "Task",
    "WindowCollator",
    "check_questions",
    "data_folder",
    "describe_task",
    "find_answers",
    "find_pairs",
    "language_groups",
    "length_grouped",
    "length_statistics",
    "load_splits",
    "may_have_no_answer",
    "read_as_text",
    "read_pairs",
    "refuse_long_questions",
    "refuse_rows_without_tokens",
    "report_special_tokens",
    "require_length",
    "require_offsets",
    "right_answers",
    "shuffled",
    "tokenize",
    "tokenize_pairs",
    "tokenize_questions",
]
