"""Runs that keep their best weights, or end early."""

from __future__ import annotations

import json

import pytest
from tiny_inputs import accuracy_of

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]

STANDING_STILL = ("train.learning_rate=1e-7", "train.warmup_steps=0", "train.num_train_epochs=12")


@pytest.fixture
def run(classification, inputs, tmp_path, capsys):
    """Call the recipe with overrides; returns its run folder and what it said."""

    def call(*overrides: str):
        output = tmp_path / "run"
        code = classification.main(
            ["--config", str(inputs / "run.yaml"), f"train.output_dir={output}", *overrides]
        )
        said = capsys.readouterr()
        assert code == 0, said.err
        return output, json.loads((output / "summary.json").read_text()), said.out

    return call


@pytest.mark.parametrize("kind", ["last", "averaged"])
def test_the_kept_folder_scores_what_the_summary_says_of_it(run, inputs, kind):
    output, summary, said = run(f"eval.keep_best={kind}", "averaging.start=0.2", "eval.eval_steps=6")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = {
        record["step"]: record["accuracy"] for record in records if record["kind"] == f"validation/{kind}"
    }
    first_best = min(step for step, score in scores.items() if score == max(scores.values()))
    assert summary["best"] == {
        "step": first_best, "weights": kind, "metric": "accuracy", "score": max(scores.values())
    }  # fmt: skip
    assert accuracy_of(output / "best", inputs / "validation.csv") == pytest.approx(summary["best"]["score"])
    found = f"{kind}, step {first_best}, validation accuracy {max(scores.values()):.4f}"
    assert f"best weights ({found}) saved in {output / 'best'}" in said
    assert "stopped_early_at" not in summary


@pytest.mark.parametrize("rule", ["swa", "lawa", "power_ema", "windows"])
def test_a_run_that_no_longer_gets_better_ends_early_with_everything_saved(run, inputs, rule):
    output, summary, said = run(
        *STANDING_STILL,
        f"averaging.rule={rule}",
        "averaging.start=12",
        "eval.eval_steps=5",
        "eval.early_stopping_patience=2",
        *(["averaging.last=4"] if rule == "lawa" else []),
    )
    # Evaluations count from step 15 on, when there is an average; the score of step 5 is never beaten.
    assert summary["stopped_early_at"] == summary["steps"] == summary["applied_steps"] == 20
    assert "stopped early, after step 20 of 108" in said
    assert summary["num_averaged"] == (4 if rule == "lawa" else 9)
    assert summary["best"]["step"] == 5
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record["step"] for record in records if record["kind"] == "validation/last"]
    assert evaluated == ([5, 10, 15, 20, 20] if rule == "windows" else [5, 10, 15, 20])
    assert "Objective = TaskLoss" in said
    if rule == "lawa":
        assert "Averaging = LAWA(last=4, start=12, every=1): the 4 weights from step 105 to 108" in said
    assert not (output / "best").exists()  # nobody asked for it
    for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
        for split in ("validation", "test"):
            expected = accuracy_of(output / folder, inputs / f"{split}.csv")
            assert summary["scores"][split][weights]["accuracy"] == pytest.approx(expected)


def test_the_loss_may_decide(run):
    _, summary, _ = run(
        "eval.keep_best=either",
        "eval.metric_for_best_model=loss",
        "train.num_train_epochs=2",
        "averaging.start=3",
    )
    assert summary["metric"] == "accuracy"
    final = min(scores["loss"] for scores in summary["scores"]["validation"].values())
    assert summary["best"]["metric"] == "loss"
    assert summary["best"]["score"] <= final
