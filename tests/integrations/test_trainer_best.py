"""The best model of a Trainer's run: chosen, and exported, with its average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_trainer import averaged, exported, trainer
from transformers import EarlyStoppingCallback

import swaft
from swaft.errors import ConfigError
from swaft.integrations.transformers import WeightAveragingCallback, averaged_weights

pytestmark = pytest.mark.unit


@pytest.fixture
def averaging() -> WeightAveragingCallback:
    return WeightAveragingCallback(swaft.SWA(start=0.5))


def test_the_best_checkpoint_is_chosen_by_the_averaged_score_and_its_average_is_exported(tmp_path, averaging):
    run = trainer(
        tmp_path,
        averaging,
        max_steps=12,
        save_steps=2,
        eval_delay=7,
        learning_rate=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="averaged_loss",
        greater_is_better=True,  # the largest loss of this run is not its last
    )
    run.train()
    scores = {e["step"]: e["eval_averaged_loss"] for e in run.state.log_history if "eval_averaged_loss" in e}
    best = max(scores, key=lambda step: scores[step])
    assert best < 12, scores  # else nothing is shown
    assert run.state.best_metric == scores[best]
    assert Path(run.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    with averaged_weights(run):
        assert run.evaluate()["eval_loss"] == pytest.approx(scores[best])
    mean, written = averaged(run), exported(run)
    assert all(torch.equal(mean[name], written[name]) for name in mean)
    card = (tmp_path / "final-averaged" / "README.md").read_text()
    assert f"from step 6 to {best} (as of checkpoint-{best}, the best checkpoint)" in card


def test_early_stopping_goes_by_the_averaged_score_wherever_it_stands_in_the_list(
    tmp_path, averaging, caplog
):
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    run = trainer(
        tmp_path,
        stopping,
        averaging,
        eval_delay=4,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="averaged_loss",
        greater_is_better=False,
    )
    run.train()
    assert "did not find eval_averaged_loss" not in caplog.text
    assert run.state.global_step == 6  # the second score is not ten better than the first


def test_choosing_by_the_average_before_there_is_one_is_refused_before_training(tmp_path, averaging):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "averaged_loss", "save_steps": 2}
    with pytest.raises(ConfigError, match="eval_delay=4"):
        trainer(tmp_path, averaging, **settings).train()
    with pytest.raises(ConfigError, match="set eval_on_start=False"):
        trainer(tmp_path, averaging, eval_delay=4, eval_on_start=True, **settings).train()


def test_a_trainer_that_never_evaluates_may_name_an_averaged_score(tmp_path, averaging):
    settings = {"eval_strategy": "no", "save_strategy": "no", "metric_for_best_model": "averaged_loss"}
    trainer(tmp_path, averaging, **settings).train()
    assert (tmp_path / "final-averaged").is_dir()


def test_fp16_may_skip_twenty_steps_before_the_first_evaluation(tmp_path, averaging):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "averaged_loss", "save_steps": 2}
    run = trainer(tmp_path, averaging, eval_delay=4, **settings)
    run.args.fp16 = True
    with pytest.raises(ConfigError, match=r"before step 4 .*fp16 skips .* set eval_delay=8, "):
        run.train()
    run.args.eval_delay = 8  # the last step
    run.train()


@pytest.mark.parametrize(
    ("epochs", "start", "delay"), [(2.5, 7, 2), (2.5, 9, 2.5), (2.5, 4, None), (1.5, 5, 1.5)]
)
def test_epochs_are_counted_in_steps_where_the_last_one_is_not_whole(tmp_path, epochs, start, delay):
    # 4 steps an epoch.
    run = trainer(
        tmp_path,
        WeightAveragingCallback(swaft.SWA(start=start)),
        max_steps=-1,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="averaged_loss",
        load_best_model_at_end=True,
    )
    if delay is None:
        run.train()
        return
    with pytest.raises(
        ConfigError, match=f"after 4 steps, .* before step {start}; set eval_delay={delay:g}, "
    ):
        run.train()


def test_a_best_checkpoint_from_before_averaging_leaves_the_average_of_the_whole_run(tmp_path, caplog):
    averaging = WeightAveragingCallback(swaft.SWA(start=0.75))
    settings = {"load_best_model_at_end": True, "save_steps": 2, "metric_for_best_model": "loss"}
    run = trainer(tmp_path, averaging, learning_rate=0.3, **settings)
    run.train()
    assert run.state.best_global_step < 6, run.state.log_history  # else nothing is shown
    assert averaging.averager is not None
    assert averaging.averager.num_averaged == 3
    assert (tmp_path / "final-averaged").is_dir()
    assert "best checkpoint, was written before averaging began" in caplog.text


def test_the_best_checkpoint_is_from_before_averaging_though_the_best_score_is_not(tmp_path, averaging):
    run = trainer(tmp_path, averaging, eval_steps=1, save_steps=2, load_best_model_at_end=True)
    run.args.metric_for_best_model, run.args.greater_is_better = "score", True
    run.compute_metrics = lambda _: {"score": {2: 1.0, 5: 2.0}.get(run.state.global_step, 0.0)}
    run.train()
    assert run.state.best_global_step == 5
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    assert averaging.averager.num_averaged == 5
    assert (tmp_path / "final-averaged").is_dir()


def test_a_best_checkpoint_at_which_averaging_began_is_said_to_hold_one_step_alone(
    tmp_path, averaging, caplog
):
    settings = {"load_best_model_at_end": True, "save_steps": 2, "eval_delay": 4}
    run = trainer(
        tmp_path, averaging, metric_for_best_model="averaged_drift", greater_is_better=False, **settings
    )
    run.train()
    assert run.state.best_global_step == averaging.averager.plan().first_step
    assert "final-averaged holds its weights, of a single step" in caplog.text


def test_checkpoints_without_averages_are_refused_where_the_best_one_is_loaded(tmp_path, averaging):
    with pytest.raises(ConfigError, match="save_only_model=False"):
        trainer(tmp_path, averaging, load_best_model_at_end=True, save_only_model=True, save_steps=2).train()
