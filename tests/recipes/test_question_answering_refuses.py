from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from tiny_questions import make_questions, save_questions, save_rows
from tiny_texts import save_encoder_decoder
from transformers import MarianConfig

from swaft.training.checks import Problems
from swaft.training.config import load_config

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def refuse(refusal, question_answering, question_inputs):
    """Call the recipe with overrides, see it fail in words, and return the words."""
    return partial(refusal, question_answering, question_inputs)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.doc_stride=20",), "windows of data.max_seq_length=20 tokens cannot share 20 of them"),
        (("data.max_seq_length=64",), "data.max_seq_length is 64, but the model reads at most 32 tokens"),
        (("eval.metric=sqaud",), "Did you mean 'squad'?"),
        (("data.version_2_with_negative=true", "eval.metric=squad"), "use squad_v2 or auto"),
        (("eval.null_score_diff_threshold=1",), "eval.null_score_diff_threshold is 1.0, but every question"),
        (("eval.max_answer_length=0",), "eval.max_answer_length: is 0"),
        (("train.max_answer_length=10",), "Did you mean 'eval.max_answer_length'?"),
    ],
)
def test_a_setting_that_cannot_work_is_named(refuse, overrides, expected):
    assert expected in refuse(*overrides)


def test_a_score_that_there_is_not_is_named_before_the_model_is_loaded(refuse):
    said = refuse("averaging.rule=windows", "eval.metric_for_best_model=f2", "data.max_seq_length=10000")
    assert "this run has no score 'f2'" in said
    assert "but the model reads at most" in said


@pytest.mark.parametrize(
    ("share", "refused", "accepted", "reason"),
    [
        (0.0, "NoAns_f1", "HasAns_f1", "every validation question has an answer"),
        (1.0, "HasAns_exact", "NoAns_exact", "no validation question has an answer"),
    ],
)
def test_weights_are_chosen_by_questions_that_validation_has(
    question_answering, question_inputs, refuse, tmp_path, share, refused, accepted, reason
):
    rows = save_questions(tmp_path / "rows.jsonl", 6, seed=3, unanswerable=share)
    given = ("eval.metric=squad_v2", f"data.validation_file={rows}", "averaging.rule=windows")
    said = refuse(*given, f"eval.metric_for_best_model={refused}")
    assert f"eval.metric_for_best_model is {refused}, but {reason}; choose another" in said
    chosen = ["--config", str(question_inputs / "run.yaml"), *given, f"eval.metric_for_best_model={accepted}"]
    problems = Problems()
    ready = question_answering.prepare(load_config(question_answering.Config, chosen), problems)
    assert (problems.found, ready.target.chosen, ready.target.better) == ([], accepted, max)


def changed(path: Path, **changes) -> tuple[str, str]:
    """Settings that name training rows, and test rows of which the second is changed."""
    rows = make_questions(3, seed=9)
    rows[1] |= changes
    train = save_questions(path / "train.jsonl", 8, seed=8)
    return f"data.train_file={train}", f"data.test_file={save_rows(path / 'test.jsonl', rows)}"


def test_questions_without_an_answer_contradict_the_first_version(refuse, tmp_path):
    rows = changed(tmp_path, answers={"text": [], "answer_start": []})
    said = refuse(*rows, "data.version_2_with_negative=false")
    assert "data.version_2_with_negative is false, but questions have no answer (1 of test)" in said
    assert "eval.metric: squad cannot score questions that have no answer" in refuse(
        *rows, "eval.metric=squad"
    )


def test_a_model_that_cannot_point_at_answers_is_refused(refuse, tmp_path):
    MarianConfig(vocab_size=8, pad_token_id=0).save_pretrained(tmp_path / "marian")
    said = refuse(f"model.model_name_or_path={tmp_path / 'marian'}")
    assert said.count("a marian has no form for question answering in transformers") == 1
    assert "Unrecognized configuration class" not in said


def test_everything_that_is_wrong_is_said_at_once(refuse, tmp_path):
    MarianConfig(vocab_size=8, pad_token_id=0).save_pretrained(tmp_path / "marian")
    said = refuse(*changed(tmp_path, question=""), f"model.model_name_or_path={tmp_path / 'marian'}")
    assert "empty text in column 'question'" in said
    assert "no form for question answering" in said


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(refuse, tmp_path):
    folder = save_encoder_decoder(tmp_path / "model", special={"unk_token": "<unk>"})
    assert "has no padding token" in refuse(f"model.tokenizer_name={folder}")


def test_a_model_that_was_asked_before_keeps_its_head(question_answering, question_inputs, tmp_path, capsys):
    """Trained for a step at a rate of next to nothing, from the folder of a run; a new head would be another."""
    config = ["--config", str(question_inputs / "run.yaml"), "averaging.rule=none"]
    tiny_step = ("train.max_steps=1", "train.warmup_steps=0", "train.learning_rate=1e-12")
    for folder, model in (
        ("first", ()),
        ("second", (f"model.model_name_or_path={tmp_path / 'first/final'}", "train.seed=7")),
    ):
        arguments = [*config, f"train.output_dir={tmp_path / folder}", *tiny_step, *model]
        assert question_answering.main(arguments) == 0, capsys.readouterr().err
    first, second = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second")
    )
    assert second["scores"]["test"]["last"]["loss"] == pytest.approx(first["scores"]["test"]["last"]["loss"])
