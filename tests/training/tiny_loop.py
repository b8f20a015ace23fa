"""The loop of the recipes, on a model that can be followed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import default_collate

import swaft
from swaft.noise import TaskLoss
from swaft.training.config import ModelConfig, TrainConfig
from swaft.training.data.classification import ClassificationConfig, ClassificationEvalConfig
from swaft.training.evaluation.best import Target
from swaft.training.models.build import build_schedule
from swaft.training.run.run import Run

SMALL: dict[str, Any] = {"logging_steps": 1, "learning_rate": 0.1, "per_device_train_batch_size": 2}


class Tokenizer:
    """Stands in for a tokenizer."""

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")


def train(
    make_accelerator: Callable[[int], Accelerator],
    model,
    rows,
    *,
    objective=None,
    rule=None,
    evaluate: Any = None,
    evaluation=None,
    groups=None,
    called=None,
    parts=None,
    **settings: Any,
):
    """Train a model on rows; returns the records of the log, where the run stands, and the averager."""
    config = ClassificationConfig(
        model=ModelConfig(model_name_or_path="-"),
        train=TrainConfig(**(SMALL | settings)),
        eval=evaluation or ClassificationEvalConfig(),
    )
    rate, objective = config.train.learning_rate, objective or TaskLoss()
    with Run(config, make_accelerator(config.train.gradient_accumulation_steps)) as run:
        model, optimizer, loader = run.prepare(
            model,
            lambda model: torch.optim.SGD(groups(model) if groups else model.parameters(), lr=rate),
            Dataset.from_list(rows).with_format("torch"),
            default_collate,
            objective=objective,
        )
        averager = rule and swaft.WeightAverager(model, optimizer, rule=rule, total_steps=run.total_steps)
        schedule = build_schedule(config.train, total_steps=run.total_steps, averaging=rule is not None)
        ready: Any = SimpleNamespace(description="-", target=Target(score="accuracy", chosen="accuracy"))
        splits = {"validation"} if evaluate else ()
        run.begin(ready, Tokenizer(), splits, schedule=schedule, averager=averager, **(parts or {}))
        for step in run.steps(loader, evaluate):
            run.set_learning_rate(schedule(run.applied_steps))
            for batch, share in step.micro_batches():
                out = (called or objective)(model, batch)
                step.log(loss=out.loss)
                step.backward(out.loss * share)
            step.clip_gradients()
            optimizer.step()
            optimizer.zero_grad()
            if averager:
                averager.step()
        lines = (run.folder.path / "metrics.jsonl").read_text().splitlines()
        run.folder.release()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return SimpleNamespace(records=records, position=run.position, steps=run.applied_steps, averager=averager)
