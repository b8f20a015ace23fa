from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import swaft
from swaft.averaging import Readout, ReadoutSearch, Tried
from swaft.averaging.host.pipeline import Waits
from swaft.averaging.rules import Windows
from swaft.training.config import AveragingConfig, ModelConfig, TrackConfig, TrainConfig
from swaft.training.data.classification import ClassificationConfig
from swaft.training.evaluation.best import Best, Target
from swaft.training.evaluation.evaluate import Evaluation
from swaft.training.run.folder import RunFolder
from swaft.training.run.progress import (
    ProgressLog,
    closing_table,
    run_facts,
    setup_logging,
    start_trackers,
    summary,
    training_line,
)
from swaft.training.run.step import Position

pytestmark = pytest.mark.unit

RECORD = {
    "loss": 0.412,
    "task_loss": 0.398,
    "divergence": 0.014,
    "grad_norm": 1.21,
    "learning_rate": 8.7e-6,
    "tokens_per_second": 41234.0,
    "noise_to_signal": None,
    "changed": None,
    "num_averaged": 12,
}


def test_the_line_shows_loss_parts_norm_rate_speed_and_members():
    assert training_line(500, 2340, RECORD) == (
        "step 500/2340 | loss 0.412 (task 0.398, noise 0.014) | gnorm 1.21 | lr 8.7e-06 | 41.2k tok/s | swa "
        "12"
    )


def test_the_line_leaves_out_what_was_not_measured():
    plain = RECORD | {"divergence": None, "grad_norm": None, "num_averaged": 0, "tokens_per_second": 700.4}
    assert (
        training_line(1, 9, plain, averaging="ema")
        == "step 1/9 | loss 0.412 | lr 8.7e-06 | 700 tok/s | ema off"
    )
    del plain["num_averaged"]
    assert training_line(1, 9, plain).endswith("700 tok/s")


def test_the_line_shows_how_much_noise_arrived():
    noised = RECORD | {"noise_to_signal": 2.8e-4, "changed": 0.993}
    assert "nsr 0.00028 changed 99%" in training_line(1, 9, noised)
    lost = RECORD | {"divergence": 0.0, "noise_to_signal": 0.0, "changed": 0.0}
    assert "noise 0)" in training_line(1, 9, lost)
    assert "nsr 0 changed 0%" in training_line(1, 9, lost)


def test_the_table_sets_last_against_averaged():
    scores = {
        "validation": {"last": {"accuracy": 0.5, "loss": 1.25}, "averaged": {"accuracy": 0.75, "loss": 1.0}}
    }
    assert closing_table(scores, seconds=12.34) == [
        "split       weights   accuracy  loss    train seconds",
        "validation  last      0.5000    1.2500  12.3",
        "validation  averaged  0.7500    1.0000  12.3",
    ]


@pytest.fixture
def log(make_accelerator, tmp_path):
    accelerator = make_accelerator()
    run: Any = SimpleNamespace(
        accelerator=accelerator,
        folder=RunFolder.create(tmp_path, accelerator),
        config=SimpleNamespace(train=TrainConfig(output_dir="-"), averaging=AveragingConfig(rule="swa")),
        total_steps=3,
        position=Position(),
        target=Target(score="f1", chosen="f1"),
        averager=SimpleNamespace(
            applied_steps=8, count=lambda: 9, plan=lambda: Windows(blocks=3, start=0).plan(8)
        ),
    )
    return ProgressLog(run)


def test_every_record_goes_to_the_screen_and_to_metrics_jsonl(log, tmp_path, caplog):
    logging.getLogger("swaft").propagate = True
    with caplog.at_level("INFO", logger="swaft"):
        log.training(2, RECORD)
        log.evaluation(2, "validation", {"last": {"accuracy": 0.5}, "averaged": {"accuracy": 0.75}})
        log.close()
    assert "step 2/3 | loss 0.412" in caplog.text
    assert "| windows 12" in caplog.text  # the averager's rule, whatever the settings say
    assert "validation, averaged weights | accuracy 0.7500" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 2),
        ("validation/last", 2),
        ("validation/averaged", 2),
    ]
    assert records[0]["loss"] == 0.412
    assert "changed" not in records[0]


@pytest.mark.parametrize(
    ("choices", "readout", "message"),
    [
        (["window"], Readout(start=3), "the 6 weights from step 3 to 8, best of 2 windows"),
        (["window"], Readout(start=8), "no window scored better than the last weights; final-averaged holds those"),
        (["blend"], Readout(blend=0.3), "the 9 weights from step 0 to 8, 0.3 of the way from the last ones, best"),
        (["window", "blend"], Readout(blend=0), "no window or blend scored better than the last weights; final"),
    ],
)  # fmt: skip
def test_what_was_chosen_after_training_is_said_with_its_score(log, caplog, choices, readout, message):
    logging.getLogger("swaft").propagate = True
    found = Tried(readout, start=readout.start or 0, end=8, members=9, score=69.8551)
    with caplog.at_level("INFO", logger="swaft"):
        log.searching(choices, evaluations=5)
        log.window(ReadoutSearch(found, (found, found)), choices)
        log.close()
    assert f"choosing the {' and the '.join(choices)} of the average by f1 on validation data" in caplog.text
    assert f"averaged: {message}" in caplog.text
    assert "(f1 69.8551)" in caplog.text


def test_the_banner_counts_rows_over_all_ranks(make_accelerator, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    train = TrainConfig(output_dir="-", per_device_train_batch_size=4, gradient_accumulation_steps=3)
    run: Any = SimpleNamespace(
        **{"config": SimpleNamespace(train=train), "accelerator": make_accelerator(), "averager": None},
        **{"objective": swaft.TaskLoss(), "model": torch.nn.Linear(1, 1), "num_parameters": "2"},
        **{"num_rows": 96, "total_steps": 10, "steps_per_epoch": 4},
    )
    facts = run_facts(run, task="classes", schedule=lambda step: 0.1)
    assert facts["Total train batch size (w. parallel, distributed & accumulation)"] == 24
    assert facts["Num epochs"] == "2.50"
    assert facts["Averaging"] == "none"


@pytest.mark.parametrize("stopped", [True, False])
def test_the_summary_says_how_far_the_run_came_and_what_was_tried(stopped):
    tried = [Tried(Readout(start=n), start=n, end=8, members=9 - n, score=0.5 + n) for n in (2, 4)]
    run: Any = SimpleNamespace(
        position=Position(step=7, stopped=stopped),
        applied_steps=6,
        target=Target(score="f1", chosen="loss"),
        averager=SimpleNamespace(num_averaged=5, waits=Waits(count=2, seconds=0.12345)),
        best=SimpleNamespace(found=Best(step=4, weights="averaged", metric="loss", score=0.25)),
    )
    evaluations = {
        "test": {"last": Evaluation(scores={"f1": 0.5}), "averaged": Evaluation(scores={"f1": 0.75})}
    }
    found = summary(run, evaluations, seconds=1.23456, window=ReadoutSearch(tried[1], tuple(tried)))
    assert found.pop("window") == tried[1].row()
    assert found.pop("windows_tried") == [each.row() for each in tried]
    assert found.pop("stopped_early_at", None) == (7 if stopped else None)
    assert found == {
        "metric": "f1",
        "scores": {"test": {"last": {"f1": 0.5}, "averaged": {"f1": 0.75}}},
        "steps": 7,
        "applied_steps": 6,
        "num_averaged": 5,
        "train_seconds": 1.235,
        "best": {"step": 4, "weights": "averaged", "metric": "loss", "score": 0.25},
        "averaging_waits": 2,
        "averaging_wait_seconds": 0.123,
    }


@pytest.mark.parametrize(("rank", "levels"), [("0", "as before"), ("1", {logging.ERROR})])
def test_other_libraries_warn_on_the_first_rank_only(rank, levels, monkeypatch):
    loggers = [logging.getLogger(name) for name in ("swaft", "datasets", "transformers")]
    before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
    monkeypatch.setenv("RANK", rank)
    try:
        setup_logging()
        found = {each.level for each in loggers[1:]}
    finally:
        for each, level, handlers, propagate in before:
            each.setLevel(level)
            each.handlers, each.propagate = handlers, propagate
    assert found == ({level for _, level, *_ in before[1:]} if levels == "as before" else levels)


def test_no_bar_is_drawn_where_there_is_no_terminal(log, capsys):
    log.advance()
    log.close()
    assert "step" not in capsys.readouterr().err


def test_trackers_get_flat_settings_and_the_folders_name(monkeypatch, make_accelerator):
    config = ClassificationConfig(
        model=ModelConfig(model_name_or_path="demo"),
        train=TrainConfig(output_dir="runs/mrpc-1"),
        track=TrackConfig(report_to="wandb", project_name="p"),
    )
    accelerator, told = make_accelerator(), {}
    monkeypatch.setattr(accelerator, "init_trackers", lambda name, **kwargs: told.update(kwargs, name=name))
    start_trackers(accelerator, config)
    assert told["name"] == "p"
    assert told["init_kwargs"]["wandb"] == {"name": "mrpc-1"}
    assert told["init_kwargs"]["mlflow"] == {"run_name": "mrpc-1"}
    assert told["config"]["train.seed"] == 42
    assert all(isinstance(value, str | int | float | bool) for value in told["config"].values())
    start_trackers(accelerator, replace(config, track=TrackConfig(report_to="tensorboard", run_name="own")))
    assert told["name"] == "swaft/own"  # a folder inside the logs


def test_a_line_says_how_long_training_will_take_yet():
    timed = RECORD | {"seconds": 100.0}
    assert training_line(500, 2000, timed).endswith(" | 0:05:00 of training left")
    assert "left" not in training_line(2000, 2000, timed)
