"""ROUGE of one generated text against its references, in the two ways that are both called ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version

from swaft.training.metrics.names import library

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

COCO_BETA = 1.2
"""How much more recall weighs than precision in `rougeL_coco`; the value of the COCO caption scripts."""

# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows and then
# anything but a lower-case letter. A text with line breaks is taken to have one sentence a line already.
SENTENCE_END = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=[^\sa-z])""")

# Close to the Penn Treebank tokens of the COCO scripts, whose tokenizer is a Java program.
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
COCO_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.']\w+|,\d+)*|[^\w\s]")
COCO_DROPPED = frozenset(".,:;?!-…`'\"()[]{}“”‘’–—")

TextScorer = Callable[[str, Sequence[str]], dict[str, float]]
"""Scores one prediction against all its references: numbers from 0 to 1 by name."""


def rouge_scorer(names: Sequence[str] = ROUGE_TYPES, *, use_stemmer: bool = True) -> TextScorer:
    """Return a scorer by Google's rouge-score: F1, with the best reference for each number.

    rouge-score lower-cases, keeps the letters a to z and digits, and drops the rest, so it suits English and
    its neighbours only. For rougeLsum texts are split into sentences by `split_sentences`; rouge-score's own
    way would download a model.

    Args:
        names: the numbers to compute, of `ROUGE_TYPES`.
        use_stemmer: strip English suffixes (Porter) before comparing. On, as published summarisation
            results have it.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    tokenizer = library("rouge_score.tokenizers", "rouge-score").DefaultTokenizer(use_stemmer)
    # A text is compared with several others, and stemming takes longer than comparing.
    tokenizer.tokenize = lru_cache(maxsize=10_000)(tokenizer.tokenize)
    scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(list(names), tokenizer=tokenizer)

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        lines = ["\n".join(split_sentences(text)) for text in references]
        best = scorer.score_multi(lines, "\n".join(split_sentences(prediction)))
        return {name: float(best[name].fmeasure) for name in names}

    return score


def rouge_signature(*, use_stemmer: bool = True) -> str:
    """Say how `rouge_scorer` computes, in sacrebleu's manner."""
    stemmer = "porter" if use_stemmer else "no"
    return f"refs:best-f1|stem:{stemmer}|sents:swaft|scorer:rouge-score|version:{version('rouge-score')}"


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences: its lines where it has several, else after . ! or ? (`SENTENCE_END`).

    There is no list of abbreviations: "Dr. Who" is two sentences, in predictions and references alike.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return SENTENCE_END.sub(r"\1\n", text.strip()).splitlines()


def rouge_l_coco(prediction: str, references: Sequence[str]) -> float:
    """Return ROUGE-L as the COCO caption and E2E challenge scripts compute it, from 0 to 1.

    Precision and recall of the longest common subsequence are each the best over the references, which may
    be two different ones; F weighs recall by `COCO_BETA`. So it is no smaller than ROUGE-L with the best
    reference would be at that beta, and the two must not be compared.

    Source: Lin 2004, as in the COCO caption evaluation (Chen et al. 2015); `coco_tokens` says how the
    tokens differ from theirs.
    """
    candidate = coco_tokens(prediction)
    if not candidate:
        return 0.0
    precision = recall = 0.0
    for reference in map(coco_tokens, references):
        common = longest_common_subsequence(candidate, reference)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(reference) if reference else 0.0)
    if not precision or not recall:
        return 0.0
    return (1 + COCO_BETA**2) * precision * recall / (recall + COCO_BETA**2 * precision)


def coco_signature() -> str:
    """Say how `rouge_l_coco` computes, in sacrebleu's manner."""
    return f"refs:best-p,best-r|beta:{COCO_BETA}|case:lc|tok:treebank-like|scorer:swaft"


def coco_tokens(text: str) -> list[str]:
    """Split a text as the COCO scripts do, nearly: lower case, contractions apart, punctuation dropped.

    Words keep inner hyphens, points and apostrophes, numbers their commas, and other symbols (£) are tokens.
    """
    split = CONTRACTION.sub(r" \1", text.lower().replace("’", "'"))
    return [token for token in COCO_TOKEN.findall(split) if token not in COCO_DROPPED]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest sequence of tokens that both hold in this order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
