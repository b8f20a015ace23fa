from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import swaft
from swaft.errors import ConfigError, StateError
from swaft.training import metrics
from swaft.training.config import AveragingConfig, EvalConfig
from swaft.training.evaluation import answering, generation
from swaft.training.evaluation.best import BestWeights, Target, choose_target
from swaft.training.evaluation.evaluate import TOKEN_SCORES

pytestmark = pytest.mark.unit

METRICS = [metric for module in (metrics, generation, answering) for metric in module.METRICS.values()]


class Tokenizer:
    """Stands in for a tokenizer; notes which folder there is while it saves."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self.found: list[bool] = []

    def save_pretrained(self, folder) -> None:
        self.found.append((self._folder / "model.safetensors").exists())
        (folder / "tokenizer.json").write_text("{}")


class Run:
    """A run whose weights are the number of its steps, and what its evaluations say."""

    def __init__(self, folder, *, averaged=True, metric="accuracy", **settings) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.optimizer = optimizer
        self.averager = swaft.WeightAverager(self.model, optimizer, rule=swaft.SWA(start=2), total_steps=100)
        self.tokenizer = Tokenizer(folder)
        self.folder, self.step = folder, 0
        nn.init.zeros_(self.model.weight)
        self.best = BestWeights(
            EvalConfig(eval_steps=1, **settings),
            target=Target(score=metric, chosen=metric, better=min if metric == "loss" else max),
            folder=folder,
            tokenizer=self.tokenizer,
            engine=self.averager.engine,
            averager=self.averager if averaged else None,
        )

    def after_a_step(self, last: float, averaged: float | None = None) -> bool:
        """Take a step and evaluate; returns whether the run is to stop."""
        self.model.weight.grad = -torch.ones_like(self.model.weight)
        self.optimizer.step()
        self.averager.step()
        self.step += 1
        scores = {"last": {"accuracy": last, "loss": -last}}
        if averaged is not None:
            scores["averaged"] = {"accuracy": averaged, "loss": -averaged}
        return self.best.observe(self.step, scores)

    @property
    def kept(self) -> float:
        return load_file(self.folder / "model.safetensors")["weight"].item()


def test_the_last_weights_are_kept_when_they_are_better_and_only_then(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    for score, kept in ((0.5, 1.0), (0.7, 2.0), (0.7, 2.0), (0.6, 2.0), (0.8, 5.0)):
        run.after_a_step(score, 0.9)  # the average is better, and nobody asked for it
        assert run.kept == kept
    assert vars(run.best.found) == {"step": 5, "weights": "last", "metric": "accuracy", "score": 0.8}
    assert {entry.name for entry in tmp_path.iterdir()} == {"best"}
    assert (tmp_path / "best" / "tokenizer.json").exists()
    card = (tmp_path / "best" / "README.md").read_text()
    assert "\n# best\n" in card  # not the folder it was written in
    assert (
        "holds weights of a training run, not averaged (the best so far: step 5, validation accuracy 0.8000)"
        in card
    )


def test_the_averaged_weights_are_kept_once_there_is_an_average(tmp_path):
    run = Run(tmp_path / "best", keep_best="averaged")
    run.after_a_step(0.9)
    assert not (tmp_path / "best").exists()
    run.after_a_step(0.9, 0.5)
    run.after_a_step(0.9, 0.6)
    assert run.kept == 2.5  # of steps 2 and 3
    assert run.best.found.weights == "averaged"
    assert (
        "averaged by `SWA(start=2, every=1, include_start=True)`: the 2 weights from step 2 to 3 (the best so far: "
        "step 3, validation accuracy 0.6000)"
    ) in (tmp_path / "best" / "README.md").read_text()


def test_of_either_the_better_is_kept_and_the_averaged_where_they_are_equal(tmp_path):
    run = Run(tmp_path / "best", keep_best="either")
    run.after_a_step(0.4)
    assert (run.kept, run.best.found.weights) == (1.0, "last")
    run.after_a_step(0.5, 0.5)
    run.after_a_step(0.6, 0.6)
    assert (run.kept, run.best.found.weights) == (2.5, "averaged")
    run.after_a_step(0.8, 0.7)
    assert (run.kept, run.best.found.weights) == (4.0, "last")


def test_of_a_loss_the_lower_is_better(tmp_path):
    run = Run(tmp_path / "best", keep_best="last", metric="loss")
    for score in (0.5, 0.7, 0.6):  # the loss is its negative
        run.after_a_step(score)
    assert (run.kept, run.best.found.score) == (2.0, -0.7)


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    run = Run(tmp_path / "best", keep_best="either")
    run.after_a_step(math.nan)
    assert run.best.found is None
    run.after_a_step(0.1, math.nan)
    run.after_a_step(math.nan, 0.2)
    assert (run.best.found.step, run.best.found.weights) == (3, "averaged")


def test_the_old_best_is_whole_until_the_new_one_is(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    for score in (0.1, 0.2, 0.3):
        run.after_a_step(score)
    assert run.tokenizer.found == [False, True, True]  # whenever the last file of a new one was written


def test_a_folder_that_cannot_be_written_ends_the_run_and_leaves_the_old_one(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    run.after_a_step(0.1)

    def full(folder) -> None:
        raise OSError("No space left on device")

    run.tokenizer.save_pretrained = full
    with pytest.raises(StateError, match=r"best could not be written: .*No space left"):
        run.after_a_step(0.2)
    assert run.kept == 1.0


def test_a_run_stops_after_so_many_evaluations_without_a_better_score(tmp_path):
    run = Run(tmp_path / "best", averaged=False, early_stopping_patience=2)
    scores = (0.5, 0.4, 0.6, 0.6, 0.5)
    assert [run.after_a_step(score) for score in scores] == [False, False, False, False, True]
    assert not (tmp_path / "best").exists()  # nobody asked for it
    assert run.best.found.step == 3


def test_a_gain_up_to_the_threshold_is_none_though_it_is_the_best(tmp_path):
    run = Run(
        tmp_path / "best",
        averaged=False,
        keep_best="last",
        early_stopping_patience=2,
        early_stopping_threshold=0.1,
    )
    assert [run.after_a_step(score) for score in (0.5, 0.55, 0.7, 0.75, 0.8)] == [False] * 4 + [True]
    assert run.kept == 5.0


def test_patience_begins_once_there_is_an_average(tmp_path):
    run = Run(tmp_path / "best", early_stopping_patience=1)
    assert [run.after_a_step(score) for score in (0.5, 0.4, 0.3)] == [False] * 3
    assert not run.after_a_step(0.2, 0.6)
    assert run.after_a_step(0.2, 0.5)


def test_without_being_told_which_weights_it_is_the_better_of_both_that_a_stop_watches(tmp_path):
    run = Run(tmp_path / "best", early_stopping_patience=1)
    assert not any(run.after_a_step(*scores) for scores in ((0.5, 0.5), (0.4, 0.6), (0.7, 0.5)))
    assert run.after_a_step(0.7, 0.7)


def test_rank_0_decides_for_all_where_machines_round_apart(tmp_path):
    run = Run(tmp_path / "best", averaged=False, early_stopping_patience=1)
    run.best._engine = SimpleNamespace(ranks=SimpleNamespace(gather=lambda mine: [{"last": 0.5}, mine]))
    assert not run.after_a_step(0.4)
    assert run.after_a_step(0.6)
    assert run.best.found.score == 0.5


def test_the_best_of_a_checkpoint_comes_back_whatever_came_after_it(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    run.after_a_step(0.5)
    run.best.save_state(tmp_path / "checkpoint-1" / "best")
    run.after_a_step(0.7)
    assert run.kept == 2.0
    again = Run(tmp_path / "best", keep_best="last")
    again.best.load_state(tmp_path / "checkpoint-1" / "best")
    assert (again.kept, again.best.found.step) == (1.0, 1)
    elsewhere = Run(tmp_path / "other" / "best", keep_best="last")
    elsewhere.best.load_state(tmp_path / "checkpoint-1" / "best")
    assert elsewhere.kept == 1.0
    assert {path.name for path in (tmp_path / "other" / "best").iterdir()} == {
        path.name for path in run.folder.iterdir()
    }


def test_evaluations_in_vain_before_a_checkpoint_count_after_it(tmp_path):
    settings = {"averaged": False, "early_stopping_patience": 2}
    run = Run(tmp_path / "best", **settings)
    assert not any(run.after_a_step(score) for score in (0.5, 0.4))
    run.best.save_state(tmp_path / "checkpoint-2" / "best")
    again = Run(tmp_path / "best", **settings)
    again.best.load_state(tmp_path / "checkpoint-2" / "best")
    assert again.after_a_step(0.4)


def test_where_a_checkpoint_has_no_best_what_came_after_it_goes(tmp_path):
    run = Run(tmp_path / "best", keep_best="averaged")
    run.after_a_step(0.5)
    run.best.save_state(tmp_path / "checkpoint-1" / "best")
    run.after_a_step(0.5, 0.6)
    assert run.folder.exists()
    run.best.load_state(tmp_path / "checkpoint-1" / "best")
    assert run.best.found is None
    assert not run.folder.exists()


def test_a_checkpoint_has_files_of_its_own_of_the_best(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    run.after_a_step(0.5)
    kept = tmp_path / "checkpoint-1" / "best"
    run.best.save_state(tmp_path / "checkpoint-1" / "best")
    for path in run.folder.iterdir():
        assert not path.samefile(kept / path.name), "damage to one would be damage to both"
    run.after_a_step(0.7)
    assert load_file(kept / "model.safetensors")["weight"].item() == 1.0
    assert run.kept == 2.0


def test_a_file_that_is_no_part_of_a_checkpoint_does_not_come_back(tmp_path):
    run = Run(tmp_path / "best", keep_best="last")
    run.after_a_step(0.5)
    run.best.save_state(tmp_path / "checkpoint-1" / "best")
    (tmp_path / "checkpoint-1" / "best" / "pytorch_model.bin").write_bytes(b"stray")
    run.best.load_state(tmp_path / "checkpoint-1" / "best")
    assert not (run.folder / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {"keep_best": "last"},
            {"keep_best": "last", "metric": "loss"},
            "metric_for_best_model is loss, but was",
        ),
        (
            {"keep_best": "last"},
            {"keep_best": "averaged"},
            "looks at averaged weights, but the best were last",
        ),
        ({"early_stopping_patience": 9}, {"keep_best": "either"}, "were not kept"),
    ],
)
def test_the_best_is_chosen_anew_where_it_cannot_be_compared_with_what_was(
    tmp_path, before, now, message, caplog
):
    run = Run(tmp_path / "best", **before)
    run.after_a_step(0.5)
    run.best.save_state(tmp_path / "checkpoint-1" / "best")
    again = Run(tmp_path / "best", **now)
    again.best.load_state(tmp_path / "checkpoint-1" / "best")
    assert again.best.found is None
    assert message in caplog.text


def test_a_score_that_there_is_not_is_refused_before_training():
    main = metrics.METRICS["accuracy_f1"]
    chosen = choose_target(EvalConfig(metric_for_best_model="f1"), main, ["train"])
    assert (chosen.chosen, chosen.better) == ("f1", max)
    chosen = choose_target(EvalConfig(metric_for_best_model="loss"), main, ["train"])
    assert (chosen.chosen, chosen.better) == ("loss", min)
    assert choose_target(EvalConfig(), main, ["train"]).chosen == "accuracy"
    with pytest.raises(ConfigError, match=r"no score 'rouge1' to .*; expected one of accuracy, f1, loss$"):
        choose_target(EvalConfig(metric_for_best_model="rouge1"), main, ["train"])


def test_decoders_are_chosen_by_any_of_their_scores():
    found = {
        name: choose_target(EvalConfig(metric_for_best_model=name), None, ["train"], others=TOKEN_SCORES)
        for name in TOKEN_SCORES
    }
    assert {name: target.better for name, target in found.items()} == {
        "loss": min,
        "perplexity": min,
        "token_accuracy": max,
    }
    assert {target.score for target in found.values()} == {"loss"}
    with pytest.raises(ConfigError, match=r"expected one of loss, perplexity, token_accuracy$"):
        choose_target(EvalConfig(metric_for_best_model="accuracy"), None, ["train"], others=TOKEN_SCORES)


@pytest.mark.parametrize("asked", [{"eval_steps": 2}, {"keep_best": "last"}, {"early_stopping_patience": 1}])
def test_weights_cannot_be_judged_without_validation_rows(asked):
    main = metrics.METRICS["accuracy"]
    with pytest.raises(ConfigError, match=f"eval.{next(iter(asked))}: .* there are none"):
        choose_target(EvalConfig(**{"eval_steps": 1} | asked), main, ["train", "test"])
    choose_target(EvalConfig(**{"eval_steps": 1} | asked), main, ["train", "validation"])


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        (
            AveragingConfig(rule="swa", search_blend=True),
            r"averaging\.search_blend: .* there are none; .* remove it",
        ),
        (
            AveragingConfig(rule="windows"),
            r"averaging\.rule=windows: .* there are none; .* choose another rule",
        ),
    ],
)
def test_a_blend_or_a_window_is_chosen_on_validation_rows(searched, expected):
    main = metrics.METRICS["accuracy"]
    with pytest.raises(ConfigError, match=expected):
        choose_target(EvalConfig(), main, ["train", "test"], searched)
    choose_target(EvalConfig(), main, ["train", "validation"], searched)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_knows_the_names_of_its_scores(metric):
    chosen = choose_target(EvalConfig(), metric, [])
    assert chosen.better is (min if metric.name == "mse" else max)


def test_a_metric_of_a_recipe_of_ones_own_says_which_of_its_scores_are_better_when_lower():
    errors = metrics.Metric(
        "errors", ("mae", "r2"), lambda predictions, references: {}, lower_is_better=("mae",)
    )
    better = {
        name: choose_target(EvalConfig(metric_for_best_model=name), errors, ["train"]).better
        for name in (*errors.names, "loss")
    }
    assert better == {"mae": min, "r2": max, "loss": min}
