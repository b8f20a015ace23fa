"""A classifier is trained on one language and evaluated on several."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny_inputs import save_rows

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


def save_language(path: Path, words: dict[str, str], *, seed: int, count: int) -> None:
    """The rows of `save_rows`, with some words exchanged."""
    save_rows(path, count, seed=seed)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                header,
                *([" ".join(words.get(word, word) for word in text.split()), label] for text, label in rows),
            ]
        )


def test_every_language_has_scores_of_its_own_and_the_mean_is_over_all(
    classification, inputs, tmp_path, capsys
):
    rows, output = tmp_path / "rows", tmp_path / "run"
    rows.mkdir()
    same, other = {}, {"good": "bad", "fine": "awful", "bad": "good", "awful": "fine"}
    for name, words, count in (
        ("train", same, 70),
        ("validation", same, 23),
        ("test", same, 11),
        ("test.xx", other, 17),  # says the opposite of what it means: every answer is wrong
        ("validation.yy", same, 9),
        ("test.yy", same, 9),
    ):
        save_language(rows / f"{name}.csv", words, seed=len(name), count=count)
    files = [f"data.{split}_file={rows / split}.csv" for split in ("train", "validation", "test")]
    code = classification.main(
        [
            "--config",
            str(inputs / "run.yaml"),
            f"train.output_dir={output}",
            *files,
            "data.eval_languages=xx,yy",
        ]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    scores = json.loads((output / "summary.json").read_text())["scores"]
    assert set(scores) == {
        *("validation", "validation_yy", "validation_mean"),
        *("test", "test_xx", "test_yy", "test_mean"),
    }
    for weights in ("last", "averaged"):
        accuracy = {split: kinds[weights]["accuracy"] for split, kinds in scores.items()}
        assert accuracy["test"] == accuracy["test_yy"] == 1.0
        assert accuracy["test_xx"] == 0.0
        assert accuracy["test_mean"] == pytest.approx(2 / 3)  # of the languages, however many rows each has
        assert "loss" in scores["test_mean"][weights]
    assert any(line.startswith("test_mean") and "0.6667" in line for line in said.out.splitlines())
    # While it trains it is evaluated on its own language alone.
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = {kind: [line["step"] for line in lines if line["kind"] == f"{kind}/last"] for kind in scores}
    assert len(steps["validation"]) > 2
    assert [len(steps[kind]) for kind in ("validation_yy", "test_yy", "test_mean")] == [1, 1, 1]


def test_a_label_that_only_another_language_has_is_named(classification, inputs, tmp_path, capsys):
    save_rows(tmp_path / "train.csv", 30, seed=1)
    save_rows(tmp_path / "test.csv", 5, seed=2)
    save_rows(tmp_path / "test.xx.csv", 5, seed=2, label=lambda positive: 2)
    files = [f"data.{split}_file={tmp_path / split}.csv" for split in ("train", "test")]
    code = classification.main(
        [
            *("--config", str(inputs / "run.yaml"), f"train.output_dir={tmp_path / 'run'}"),
            *(*files, "data.eval_languages=xx"),
        ]
    )
    assert code == 1
    assert "row 1 of test_xx has label=2; expected 0 to 1" in capsys.readouterr().err
