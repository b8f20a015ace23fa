"""Evaluates generated texts, and the likelihood that a model gives to the right ones.

Each text is scored against one or more references: ROUGE, BLEU and chrF, all from 0 to 100.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from swaft.errors import ConfigError
from swaft.training.data.causal_lm import CausalDataConfig, CausalEvalConfig
from swaft.training.data.seq2seq import Seq2SeqDataConfig, Seq2SeqEvalConfig, bleu_language
from swaft.training.data.texts import IGNORED
from swaft.training.evaluation.evaluate import (
    ROW_ID,
    Evaluation,
    evaluating,
    measured_once,
    require_finite,
    summed_losses,
    without_row_id,
)
from swaft.training.metrics import Metric, library, refuse_unfit

logger = logging.getLogger(__name__)

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000
"""Bootstrap samples for the intervals."""
COCO_BETA = 1.2
"""How much more recall weighs than precision in `rougeL_coco`; the value of the COCO caption scripts."""

# A sentence ends at . ! or ?, including closing quotes and brackets, if white space follows and then
# anything but a lowercase letter. A text with line breaks is taken to have one sentence per line already.
SENTENCE_END = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=[^\sa-z])""")

# Five letters or marks in a row of scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese.
UNSPACED = re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uff01-\uff9f]{5}")

# Close to the Penn Treebank tokens of the COCO scripts, whose tokenizer is a Java program.
CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
COCO_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.']\w+|,\d+)*|[^\w\s]")
COCO_DROPPED = frozenset(".,:;?!-…`'\"()[]{}“”‘’–—")

References = Sequence[Sequence[str]]
"""The right texts of each row, one or more."""


@dataclass(frozen=True)
class GenerationScores:
    """Scores, their intervals, and how they were computed."""

    scores: dict[str, float]
    """Scores by name, 0 to 100."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals over the rows, for scores that are means over rows (all but BLEU, chrF)."""
    signatures: dict[str, str]
    """How each score was computed; scores with different signatures cannot be compared."""


def get_generation_metric(
    name: str = "auto", *, translates: bool = False, language: str | None = None
) -> Metric:
    """Return the metric of this name: it maps generated texts and their references to `GenerationScores`.

    Args:
        name: one of `NAMES["generation"]`, or `auto`: bleu_chrf for translations, rouge for the rest.
        translates: whether texts are translated, for `auto`.
        language: that of the texts, or a model's code for it; BLEU splits Chinese, Japanese and Korean accordingly.

    Raises:
        ConfigError: an unknown name, a metric for another kind of task, or a package that is not installed.
    """
    if name == "auto":
        name = "bleu_chrf" if translates else "rouge"
    refuse_unfit(name, "generation")
    split_as = bleu_language(language)
    metric = _table(split_as)[name].require_modules()
    if "bleu" in metric.names:
        _sacrebleu("bleu", split_as)  # as early as it is chosen, before any training
    return metric


def bootstrap_intervals(values: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Return the central 95 % of the means of rows drawn with replacement, shape (2, K): low, high.

    Args:
        values: shape (rows, K); the K numbers of a row are drawn together.
        samples: number of bootstrap samples.
        seed: seed of the draws; the same seed and rows give the same interval.
    """
    generator = np.random.default_rng(seed)
    rows = len(values)
    means = np.stack([values[generator.integers(rows, size=rows)].mean(axis=0) for _ in range(samples)])
    return np.percentile(means, (2.5, 97.5), axis=0)


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences: its lines if it has several, else after . ! or ? (`SENTENCE_END`).

    There is no list of abbreviations: "Dr. Who" is two sentences, in predictions and references alike.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return SENTENCE_END.sub(r"\1\n", text.strip()).splitlines()


def rouge_l_coco(prediction: str, references: Sequence[str]) -> float:
    """Return ROUGE-L as the COCO caption and E2E challenge scripts compute it, from 0 to 1.

    Precision and recall of the longest common subsequence are each the best over the references, possibly from
    two different ones; F weights recall by `COCO_BETA`. So it is no smaller than ROUGE-L with the best
    reference at that beta, and the two must not be compared.

    Source: Lin 2004, as in the COCO caption evaluation (Chen et al. 2015); for differences in the tokens see
    `coco_tokens`.
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


def rouge_scorer(names: Sequence[str] = ROUGE_TYPES) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """Return a scorer based on Google's rouge-score: F1, 0 to 1, with the best reference for each number.

    rouge-score lowercases, keeps the letters a to z and digits, and drops the rest, so it suits only English and
    similar languages. English suffixes are stripped (Porter), as in published summarisation results. For
    rougeLsum, texts are split into sentences by `split_sentences`; rouge-score's own method would download a model.

    Args:
        names: which of `ROUGE_TYPES` to compute.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    tokenizer = library("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=True)
    # A text is compared with several others, and stemming takes longer than the comparison.
    tokenizer.tokenize = lru_cache(maxsize=10_000)(tokenizer.tokenize)
    scorer = library("rouge_score.rouge_scorer").RougeScorer(list(names), tokenizer=tokenizer)

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        lines = ["\n".join(split_sentences(text)) for text in references]
        best = scorer.score_multi(lines, "\n".join(split_sentences(prediction)))
        return {name: float(best[name].fmeasure) for name in names}

    return score


def coco_tokens(text: str) -> list[str]:
    """Split a text almost as the COCO scripts do: lower case, contractions separated, punctuation dropped.

    Words keep inner hyphens, points and apostrophes, numbers keep commas, and other symbols (£) are tokens.
    """
    split = CONTRACTION.sub(r" \1", text.lower().replace("’", "'"))
    return [token for token in COCO_TOKEN.findall(split) if token not in COCO_DROPPED]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest sequence of tokens that both contain in this order, with gaps allowed."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _rouge(
    predictions: Sequence[str], references: References, names: Sequence[str] = ROUGE_TYPES
) -> GenerationScores:
    scorer = rouge_scorer(names)
    unreadable = sum(not any(re.search("[a-zA-Z0-9]", text) for text in row) for row in references)
    if unreadable:
        logger.warning(
            "%d of %d rows have no reference with a letter from a to z or a digit; ROUGE sees nothing else and "
            "gives them 0. Use eval.metric=chrf for texts in other scripts",
            *(unreadable, len(references)),
        )
    signature = f"refs:best-f1|stem:porter|sents:swaft|scorer:rouge-score|version:{version('rouge-score')}"
    return _means(list(map(scorer, predictions, references)), signature)


def _rouge_l_coco(predictions: Sequence[str], references: References) -> GenerationScores:
    rows = [{"rougeL_coco": score} for score in map(rouge_l_coco, predictions, references)]
    return _means(rows, f"refs:best-p,best-r|beta:{COCO_BETA}|case:lc|tok:treebank-like|scorer:swaft")


def _means(rows: list[dict[str, float]], signature: str) -> GenerationScores:
    names = list(rows[0])
    values = 100 * np.array([[row[name] for name in names] for row in rows])
    low, high = bootstrap_intervals(values, samples=RESAMPLES, seed=0)
    intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    means = dict(zip(names, map(float, values.mean(axis=0)), strict=True))
    return GenerationScores(means, intervals, dict.fromkeys(names, signature))


def _sacrebleu(name: str, language: str) -> Any:
    """Return sacrebleu's metric: BLEU with WMT's tokenization (13a, or the language's own), or chrF.

    Raises:
        ConfigError: a package is not installed.
    """
    kind = getattr(library("sacrebleu"), name.upper())
    try:
        return kind(trg_lang=language) if language else kind()
    except RuntimeError as error:
        raise ConfigError(
            f"eval.metric: BLEU in language {language} needs a package: pip install 'sacrebleu[{language}]', "
            "or set eval.metric=chrf"
        ) from error


def _of_corpus(
    name: str, predictions: Sequence[str], references: References, *, language: str = ""
) -> GenerationScores:
    """Score with sacrebleu: BLEU or chrF, both case-sensitive, as in WMT."""
    metric = _sacrebleu(name, language)
    splits_at_spaces = name == "bleu" and not language
    if splits_at_spaces and (unsplit := sum(all(map(UNSPACED.search, row)) for row in references)):
        logger.warning(
            "%d of %d rows have no reference with spaces between words; BLEU takes each run of letters for a word, "
            "and may give right texts 0. Use eval.metric=chrf, or for Chinese and Japanese set data.source_lang "
            "and data.target_lang",
            *(unsplit, len(references)),
        )
    # sacrebleu takes one list of all first references, one of all second ones, ...: None if a row has fewer.
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    score = float(metric.corpus_score(list(predictions), columns).score)
    return GenerationScores({name: score}, {}, {name: str(metric.get_signature())})


def _joined(*parts: Callable[..., GenerationScores]) -> Callable[..., GenerationScores]:
    """Return a function that computes the scores of all of these."""

    def compute(predictions: Sequence[str], references: References) -> GenerationScores:
        joined = GenerationScores({}, {}, {})
        for part in parts:
            found = part(predictions, references)
            joined.scores.update(found.scores)
            joined.intervals.update(found.intervals)
            joined.signatures.update(found.signatures)
        return joined

    return compute


ROUGE, SACREBLEU = ("rouge_score.tokenizers", "rouge_score.rouge_scorer"), ("sacrebleu",)


def _table(language: str = "") -> dict[str, Metric]:
    """Return the metrics by name, with BLEU's tokenizer for a language."""
    bleu, chrf = partial(_of_corpus, "bleu", language=language), partial(_of_corpus, "chrf")
    metrics = (
        Metric("rouge", ("rougeL", "rouge1", "rouge2", "rougeLsum"), _rouge, modules=ROUGE),
        Metric("bleu", ("bleu",), bleu, modules=SACREBLEU),
        Metric("chrf", ("chrf",), chrf, modules=SACREBLEU),
        Metric("rougeL_coco", ("rougeL_coco",), _rouge_l_coco),
        Metric("bleu_chrf", ("bleu", "chrf"), _joined(bleu, chrf), modules=SACREBLEU),
        # The scores of the E2E challenge, and the usual ROUGE-L next to its namesake.
        Metric(
            "bleu_rouge",
            ("bleu", "rougeL_coco", "rougeL"),
            _joined(bleu, _rouge_l_coco, partial(_rouge, names=("rougeL",))),
            modules=(*ROUGE, *SACREBLEU),
        ),
    )
    return {metric.name: metric for metric in metrics}


METRICS = _table()


def evaluate_texts(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    references: Sequence[Sequence[str]],
    tokenizer: Any,
    metric: Metric | None,
    generation: Mapping[str, Any],
) -> Evaluation:
    """Return the loss per token and the scores of generated texts over a dataset (collective).

    The ``loss`` is the plain cross entropy, summed over all target tokens and divided by their number, so it
    depends neither on batch size nor on ranks. ``gen_len`` is the mean length of the generated texts, in tokens,
    without the decoder's start token.

    Args:
        model: the prepared model; its training mode is restored.
        loader: prepared loader of batches with ``labels`` (B, T) and ``idx`` (B,), row numbers from 0.
        accelerator: the one that prepared both.
        references: right texts of each row, by row number.
        tokenizer: turns tokens into text.
        metric: scores texts against references; None: only the loss, nothing is generated.
        generation: arguments of the model's ``generate``, including ``max_new_tokens``.

    Raises:
        TrainingError: rows are missing, or the loss is not finite; on every rank.
    """
    padding = tokenizer.pad_token_id

    def measure(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        labels = batch["labels"]
        logits = model(**without_row_id(batch)).logits
        sums, counts = summed_losses(logits, labels), (labels != IGNORED).sum(dim=1)
        del logits  # as wide as the vocabulary; generation needs the memory
        if metric is None:
            return sums, counts, counts
        # Generated texts are padded with the token used as padding below, whatever the model's padding token is.
        tokens = generate_tokens(model, batch, accelerator, {"pad_token_id": padding, **generation})
        room = generation["max_new_tokens"] - tokens.shape[1]
        return sums, counts, nn.functional.pad(tokens, (0, room), value=padding)

    sums, counts, tokens = measured_once(model, loader, accelerator, measure, num_rows=len(references))
    loss = require_finite((sums.sum() / counts.sum()).item())
    if metric is None:
        return Evaluation(scores={"loss": loss})
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    # Every rank computes the scores, so that every rank has them, or the error, without communication.
    scored = metric.compute(texts, references)
    length = (tokens != padding).sum(dim=1).double().mean().item()
    # The checkpoint's own settings count as well: a least length, a penalty, beams.
    network: Any = accelerator.unwrap_model(model)
    settings = {**network.generation_config.to_diff_dict(), **generation, "do_sample": False}
    return Evaluation(
        scores={**scored.scores, "loss": loss, "gen_len": length},
        details={"intervals": scored.intervals, "signatures": scored.signatures, "generation": settings},
        outputs=texts,
    )


def write_answers(
    model: nn.Module,
    rows: Dataset,
    accelerator: Accelerator,
    *,
    tokenizer: Any,
    data: CausalDataConfig,
    evaluation: CausalEvalConfig,
) -> Evaluation:
    """Return the answers that a decoder generates greedily for a few prompts (collective).

    Every rank generates all of them.

    Args:
        model: the prepared model; its training mode is restored.
        rows: from `asked_rows`.
        accelerator: the one that prepared the model.
        tokenizer: turns tokens into text.
        data: section ``data``: `max_length` bounds prompt and answer together.
        evaluation: section ``eval``: `max_new_tokens` bounds the answer.
    """
    padding, size = tokenizer.pad_token_id, evaluation.per_device_eval_batch_size
    prompts = rows["input_ids"][:]
    room = [min(evaluation.max_new_tokens, data.max_length - len(prompt)) for prompt in prompts]
    # Batches of rows with the same room for an answer, so that no answer depends on the others in its batch.
    order = sorted(range(len(prompts)), key=room.__getitem__)
    groups = [list(group) for _, group in groupby(order, room.__getitem__)]
    batches = [group[first : first + size] for group in groups for first in range(0, len(group), size)]
    texts = dict[int, str]()
    with evaluating(model):
        for numbers in batches:
            ids = [torch.tensor(prompts[number]) for number in numbers]
            batch = {  # padded on the left: the answer follows its prompt
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"),
                "attention_mask": pad_sequence(
                    [torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"
                ),
            }
            length = batch["input_ids"].shape[1]
            batch = {name: each.to(accelerator.device) for name, each in batch.items()}
            settings = {"pad_token_id": padding, "max_new_tokens": room[numbers[0]]}
            tokens = generate_tokens(model, batch, accelerator, settings)
            answers = tokenizer.batch_decode(tokens[:, length - 1 :], skip_special_tokens=True)
            texts |= zip(numbers, answers, strict=True)
    return Evaluation(scores={}, outputs=[texts[number].strip() for number in range(len(prompts))])


def generation_arguments(evaluation: Seq2SeqEvalConfig, data: Seq2SeqDataConfig) -> dict[str, Any]:
    """Return the generation settings as arguments of the model's ``generate``."""
    arguments = {"max_new_tokens": evaluation.max_new_tokens or data.max_target_length}
    return arguments if evaluation.num_beams is None else arguments | {"num_beams": evaluation.num_beams}


def generate_tokens(
    model: nn.Module, batch: Mapping[str, Tensor], accelerator: Accelerator, generation: Mapping[str, Any]
) -> Tensor:
    """Return what a model generates for a batch: token ids, one row per text, padded (collective).

    The decoder's start token is dropped: it is not part of the text, and a tokenizer may take it for a
    word. ``generation`` are arguments of the model's ``generate``; the model has to be in eval mode.
    """
    network: Any = accelerator.unwrap_model(model)
    # FSDP2 gathers a model's own weights only for its forward; generate calls the encoder directly.
    if accelerator.distributed_type == DistributedType.FSDP and "generate" not in vars(network):
        register_fsdp_forward_method(network, "generate")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", ROW_ID)}
    with accelerator.autocast():
        # Under ZeRO-3 and FSDP2, transformers lets ranks that finish early continue with dummy passes, because
        # the other ranks need their shards.
        generated = network.generate(**inputs, do_sample=False, use_cache=True, **generation)
    return generated[:, 1:]
