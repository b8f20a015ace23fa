from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from swaft.errors import ConfigError, TrainingError
from swaft.training.data.question_answering import QuestionAnsweringDataConfig as Data
from swaft.training.data.question_answering import QuestionAnsweringEvalConfig, tokenize_questions
from swaft.training.data.texts import Collator
from swaft.training.evaluation.answering import (
    AnswerSearch,
    evaluate_answers,
    get_question_metric,
    refuse_unused_threshold,
    score_squad,
    score_squad_v2,
    write_predictions,
)
from swaft.training.evaluation.evaluate import Evaluation
from swaft.training.run.folder import RunFolder

pytestmark = pytest.mark.unit

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
TEXTS = {"q1": "a b c d e f g h a b c", "q2": "d e", "q3": "f a g b h", "q4": "c", "q5": "e b"}
ANSWERS = {"q1": ["g h"], "q2": ["e"], "q3": ["g"], "q4": ["c"], "q5": ["b"]}


class Reader(nn.Module):
    """Scores every token by itself, so that padding on either side changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores = nn.Embedding(len(WORDS), 2)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        starts, ends = self.scores(input_ids).unbind(-1)
        return SimpleNamespace(start_logits=starts, end_logits=ends)


def make_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, padding_side=padding_side, **names
    )


def make_questions(answers=ANSWERS) -> Dataset:
    rows = [
        {
            "id": name,
            "question": "h a",
            "context": context,
            "answers": {"text": answers[name], "answer_start": [context.index(one) for one in answers[name]]},
        }
        for name, context in TEXTS.items()
    ]
    return Dataset.from_list(rows)


def evaluate(
    accelerator,
    model,
    batch_size,
    *,
    answers=ANSWERS,
    padding_side="right",
    inputs=None,
    metric="auto",
    **settings,
) -> Evaluation:
    questions, tokenizer = make_questions(answers), make_tokenizer(padding_side)
    tokenizer.model_input_names = inputs or tokenizer.model_input_names
    windows = tokenize_questions(questions, tokenizer, Data(max_seq_length=10, doc_stride=2), training=False)
    assert len(windows) > len(questions)
    loader = DataLoader(
        windows,  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=Collator(tokenizer),
        generator=torch.Generator(),
    )
    has_unanswerable = not all(answers.values())
    return evaluate_answers(
        model,
        accelerator.prepare_data_loader(loader),
        accelerator,
        questions=questions,
        windows=windows,
        metric=get_question_metric(metric, has_unanswerable=has_unanswerable),
        search=AnswerSearch(
            has_unanswerable=has_unanswerable,
            padding_side=tokenizer.padding_side,  # type: ignore[arg-type]
            **settings,
        ),
    )


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_answers_scores_and_loss_do_not_depend_on_the_batch_size(make_accelerator, padding_side):
    accelerator, model = make_accelerator(), Reader()
    alone, *others = (evaluate(accelerator, model, size, padding_side=padding_side) for size in (1, 3, 16))
    assert len(set(alone.outputs)) > 1
    for other in others:
        assert other.outputs == alone.outputs
        assert other.scores == pytest.approx(alone.scores, rel=1e-12)


def test_a_tokenizer_without_a_mask_is_scored_too(make_accelerator):
    found = evaluate(make_accelerator(), Reader(), 16, inputs=["input_ids", "token_type_ids"])  # FNet's
    assert found.outputs == evaluate(make_accelerator(), Reader(), 16).outputs
    assert math.isfinite(found.scores["loss"])


def test_the_loss_is_the_mean_over_windows_of_the_models_own(make_accelerator):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(WORDS), **sizes)).eval()
    tokenizer = make_tokenizer("right")
    windows = tokenize_questions(
        make_questions(),
        tokenizer,
        Data(max_seq_length=10, doc_stride=2),
        training=False,
    )
    collate = Collator(tokenizer)
    with torch.no_grad():
        losses = [
            model(**{name: value for name, value in collate([window]).items() if name != "idx"}).loss.item()
            for window in windows
        ]
    found = evaluate(make_accelerator(), model, 16)
    assert found.scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_answers_are_scored_in_the_order_of_the_questions(make_accelerator):
    found = evaluate(make_accelerator(), Reader(), 4)
    expected = score_squad(dict(zip(TEXTS, found.outputs, strict=True)), list(ANSWERS.items()))
    assert found.scores == {**expected, "loss": found.scores["loss"]}
    assert found.details["questions"] == len(TEXTS)
    assert found.outputs[3] == "c"  # there is nothing else


def test_an_answer_is_no_longer_than_allowed(make_accelerator):
    found = evaluate(make_accelerator(), Reader(), 4, max_answer_length=1)
    assert {len(text.split()) for text in found.outputs} == {1}


def test_none_is_an_answer_where_its_score_exceeds_the_threshold(make_accelerator):
    answers = ANSWERS | {"q2": [], "q4": []}
    accelerator, model = make_accelerator(), Reader()
    given = {}
    for threshold in (-100.0, 0.0, 100.0):
        found = evaluate(accelerator, model, 3, answers=answers, null_score_diff_threshold=threshold)
        given[threshold] = found
        expected = score_squad_v2(dict(zip(TEXTS, found.outputs, strict=True)), list(answers.items()))
        assert expected.items() <= found.scores.items()
        assert {"NoAns_f1", "best_exact", "best_f1_thresh"} < set(found.scores)
    assert set(given[-100.0].outputs) == {""}
    assert "" not in given[100.0].outputs
    assert given[-100.0].scores["NoAns_exact"] == 100
    assert given[100.0].scores["NoAns_exact"] == 0
    assert given[-100.0].scores["best_f1"] == given[100.0].scores["best_f1"]


def test_the_second_metric_scores_the_questions_of_the_first(make_accelerator):
    accelerator, model = make_accelerator(), Reader()
    first, second = (evaluate(accelerator, model, 4, metric=name) for name in ("squad", "squad_v2"))
    assert second.outputs == first.outputs
    assert second.scores["exact"] == second.scores["HasAns_exact"] == first.scores["exact_match"]


def test_scores_that_are_no_numbers_are_an_error(make_accelerator):
    model = Reader()
    model.scores.weight.data[WORDS.index("e")] = math.nan
    with pytest.raises(TrainingError, match="the evaluation loss is nan"):
        evaluate(make_accelerator(), model, 4)


def test_a_threshold_for_none_is_refused_where_every_question_has_an_answer():
    settings = QuestionAnsweringEvalConfig(null_score_diff_threshold=-2.0)
    refuse_unused_threshold(settings, has_unanswerable=True)
    with pytest.raises(
        ConfigError, match=r"null_score_diff_threshold is -2\.0.*version_2_with_negative=true"
    ):
        refuse_unused_threshold(settings, has_unanswerable=False)
    refuse_unused_threshold(QuestionAnsweringEvalConfig(), has_unanswerable=False)


def test_predictions_are_files_for_the_official_scripts(tmp_path):
    kinds = {kind: Evaluation(scores={}, outputs=[kind, "", "é", "x", "y"]) for kind in ("last", "averaged")}
    write_predictions(RunFolder(tmp_path, is_main=True), {"test": kinds}, {"test": make_questions()})
    for name, kind in (("predictions-test.json", "last"), ("predictions-test-averaged.json", "averaged")):
        found = json.loads((tmp_path / name).read_text())
        assert found == {"q1": kind, "q2": "", "q3": "é", "q4": "x", "q5": "y"}
