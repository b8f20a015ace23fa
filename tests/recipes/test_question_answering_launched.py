from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, launch_alike
from safetensors.torch import load_file
from tiny_questions import make_questions, save_questions
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from swaft.training.config import load_config
from swaft.training.data.question_answering import QuestionAnsweringConfig
from swaft.training.evaluation.answering import score_squad, score_squad_v2

pytestmark = pytest.mark.recipe

LAUNCHERS = ("single.yaml", "zero3_cpu.yaml")
QUESTIONS = {"validation": make_questions(23, seed=2), "test": make_questions(11, seed=3)}
FOLDERS = {"last": "final", "averaged": "final-averaged"}


@pytest.fixture(scope="module")
def runs(question_inputs, tmp_path_factory) -> dict[str, Path]:
    """The same run in one process and under ZeRO-3."""
    config = question_inputs / "run.yaml"
    return launch_alike(LAUNCHERS, "question_answering", config, tmp_path_factory.mktemp("runs"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def predictions_of(output: Path, split: str, weights: str) -> dict[str, str]:
    return read_json(output / f"predictions-{split}{'' if weights == 'last' else '-averaged'}.json")


def answered_by(folder: Path, row: dict[str, Any]) -> tuple[str, list[float]]:
    """What a saved folder answers, window by window, and its loss in each, by nothing but transformers."""
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    windows = tokenizer(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=20,
        stride=6,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    right = (
        row["answers"]["answer_start"][0],
        row["answers"]["answer_start"][0] + len(row["answers"]["text"][0]),
    )
    best, losses = (-float("inf"), ""), []
    for number, ids in enumerate(windows["input_ids"]):
        places = [
            place if sequence == 1 else None
            for place, sequence in zip(
                windows["offset_mapping"][number], windows.sequence_ids(number), strict=True
            )
        ]
        position = torch.tensor([places.index(right) if right in places else 0])  # one token an answer
        inputs = {
            name: torch.tensor([windows[name][number]]) for name in ("token_type_ids", "attention_mask")
        }
        with torch.no_grad():
            output = model(torch.tensor([ids]), start_positions=position, end_positions=position, **inputs)
        losses.append(output.loss.item())
        for first, start in enumerate(places):
            for last, end in enumerate(places[: first + 30]):
                if start and end and last >= first:
                    score = (output.start_logits[0, first] + output.end_logits[0, last]).item()
                    best = max(best, (score, row["context"][start[0] : end[1]]))
    return best[1], losses


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_plain_transformers_finds_in_the_saved_folders_what_the_run_reported(runs, launcher):
    output = runs[launcher]
    scores = read_json(output / "summary.json")["scores"]
    for split, rows in QUESTIONS.items():
        for weights, folder in FOLDERS.items():
            found = [answered_by(output / folder, row) for row in rows]
            predictions = predictions_of(output, split, weights)
            assert predictions == {row["id"]: text for row, (text, _) in zip(rows, found, strict=True)}
            losses = [loss for _, each in found for loss in each]
            assert len(losses) > len(rows)  # some contexts take several windows
            assert scores[split][weights]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            right = [(row["id"], row["answers"]["text"]) for row in rows]
            assert score_squad(predictions, right).items() <= scores[split][weights].items()


def test_what_is_learnt_is_answered(runs):
    for output in runs.values():
        scores = read_json(output / "summary.json")["scores"]["validation"]
        assert scores["last"]["f1"] > 30  # of some 16 words each
        assert scores["averaged"]["f1"] > 30
        last, averaged = (load_file(output / folder / "model.safetensors") for folder in FOLDERS.values())
        assert not torch.equal(last["qa_outputs.weight"], averaged["qa_outputs.weight"])


def test_sharded_training_starts_as_one_process_does(runs):
    records = [(output / "metrics.jsonl").read_text().splitlines()[0] for output in runs.values()]
    single, sharded = (json.loads(record)["loss"] for record in records)
    # The ranks draw dropout masks of their own, and each pads its windows to the longest of its own.
    assert sharded == pytest.approx(single, rel=0.05)


def test_samples_show_both_answers_beside_the_right_ones(runs):
    output = runs["single.yaml"]
    lines = (output / "samples-test.jsonl").read_text().splitlines()
    last, averaged = (predictions_of(output, "test", weights) for weights in FOLDERS)
    assert [json.loads(line) for line in lines] == [
        {name: row[name] for name in ("id", "question", "answers")}
        | {"last": last[row["id"]], "averaged": averaged[row["id"]]}
        for row in QUESTIONS["test"][:5]
    ]


def test_the_configuration_reads_back(runs):
    config = load_config(QuestionAnsweringConfig, ["--config", str(runs["single.yaml"] / "config.yaml")])
    assert (config.data.doc_stride, config.noise.kind, config.train.group_by_length) == (6, "r3f", True)


@pytest.mark.slow
def test_questions_without_an_answer_are_told_apart_over_two_processes(question_inputs, tmp_path):
    rows = make_questions(19, seed=5, unanswerable=0.4)
    train = save_questions(tmp_path / "train.jsonl", 60, seed=4, unanswerable=0.4)
    validation = save_questions(tmp_path / "validation.jsonl", 19, seed=5, unanswerable=0.4)
    finished = launch(
        "ddp_cpu.yaml",
        "recipes/question_answering.py",
        "--config",
        str(question_inputs / "run.yaml"),
        f"data.train_file={train}",
        f"data.validation_file={validation}",
        f"train.output_dir={tmp_path / 'run'}",
        *("train.max_steps=10", "noise.kind=rdrop", "eval.null_score_diff_threshold=0.5"),
    )
    assert finished.code == 0, finished.err
    scores = read_json(tmp_path / "run" / "summary.json")["scores"]["validation"]
    for weights in FOLDERS:
        predictions = predictions_of(tmp_path / "run", "validation", weights)
        found = score_squad_v2(predictions, [(row["id"], row["answers"]["text"]) for row in rows])
        assert {"NoAns_exact", "HasAns_f1"} < set(found)
        assert found.items() <= scores[weights].items()
        assert scores[weights]["best_f1"] >= scores[weights]["f1"]
