"""The loop of the recipes, on a model that can be followed by hand."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from tiny_training import make_classifier, make_rows
from torch import nn
from torch.utils.data import default_collate

import swaft
from swaft.averaging import state
from swaft.errors import ConfigError, TrainingError
from swaft.noise import TaskLoss
from swaft.noise.passes import SentCount
from swaft.training.config import (
    AveragingConfig,
    ModelConfig,
    NoiseConfig,
    TrackConfig,
    TrainConfig,
)
from swaft.training.data.classification import (
    ClassificationConfig,
    ClassificationEvalConfig,
    DataConfig,
)
from swaft.training.evaluation.best import Target
from swaft.training.evaluation.evaluate import Evaluation
from swaft.training.models.build import build_schedule
from swaft.training.run import state as run_state
from swaft.training.run.run import Run
from swaft.training.run.step import shuffled

pytestmark = pytest.mark.unit

OLDER_CONFIG = Path(__file__).parent / "older_config.yaml"


class Tokenizer:
    """Stands in for a tokenizer."""

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def run(make_accelerator, tmp_path):
    """Train a model on rows; returns the records of the log, where the run stands, and the averager."""

    def train(
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
        **changes,
    ):
        new: dict[str, Any] = {"output_dir": str(tmp_path / str(len(list(tmp_path.iterdir()))))}
        small: dict[str, Any] = {"logging_steps": 1, "learning_rate": 0.1, "per_device_train_batch_size": 2}
        settings = TrainConfig(**(new | small | changes))
        config = ClassificationConfig(
            model=ModelConfig(model_name_or_path="-"),
            data=DataConfig(),
            train=settings,
            averaging=AveragingConfig(),
            noise=NoiseConfig(),
            eval=evaluation or ClassificationEvalConfig(),
            track=TrackConfig(),
        )
        accelerator = make_accelerator(settings.gradient_accumulation_steps)
        objective = objective or TaskLoss()
        with Run(config, accelerator) as run:
            model, optimizer, loader = run.prepare(
                model,
                lambda model: torch.optim.SGD(
                    groups(model) if groups else model.parameters(), lr=settings.learning_rate
                ),
                Dataset.from_list(rows).with_format("torch"),
                default_collate,
                objective=objective,
            )
            averager = rule and swaft.WeightAverager(model, optimizer, rule=rule, total_steps=run.total_steps)
            schedule = build_schedule(settings, total_steps=run.total_steps, averaging=rule is not None)
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
        return SimpleNamespace(
            records=records, position=run.position, steps=run.applied_steps, averager=averager
        )

    return train


def batches_of(rows: list[dict[str, Any]], *, epoch: int, batch_size: int = 2) -> list[dict[str, Any]]:
    """The batches of a pass, in the order that a run takes them."""
    order = shuffled(len(rows), seed=42)
    order.set_epoch(epoch)
    chosen = [rows[i] for i in order]
    return [default_collate(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]


def by_hand(model, rows, *, accumulation, rates, batch_size=2, max_grad_norm=1.0):
    """The same training in plain torch: the mean over each step's micro-batches, clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    a_pass = -(-len(rows) // (batch_size * accumulation))
    for number, rate in enumerate(rates):
        batches = batches_of(rows, epoch=number // a_pass, batch_size=batch_size)
        first = number % a_pass * accumulation
        group = batches[first : first + accumulation]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for batch in group:
            loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
            (loss / len(group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_training_equals_plain_torch_also_where_an_epoch_ends_on_fewer_micro_batches(run, accumulation):
    model, rows = make_classifier(), make_rows(10)  # 5 micro-batches: 2 + 2 + 1, or 4 + 1
    expected = copy.deepcopy(model)
    done = run(model, rows, gradient_accumulation_steps=accumulation, num_train_epochs=2.0)
    rates = [record["learning_rate"] for record in done.records]
    assert done.position.step == done.steps == len(rates) == 2 * -(-5 // accumulation)
    by_hand(expected, rows, accumulation=accumulation, rates=rates)
    for trained, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(trained, wanted, rtol=1e-6, atol=1e-7)


def test_a_run_folder_with_an_older_config_resumes_to_the_bit_also_with_an_optimizer_without_state(
    run, tmp_path
):
    unbroken, resumed, rows = make_classifier(), make_classifier(), make_rows(8)
    folder = tmp_path / "older"
    run(unbroken, rows, output_dir=str(folder), max_steps=4, save_steps=2)
    own = (folder / "config.yaml").read_text()
    shutil.copy(OLDER_CONFIG, folder / "config.yaml")
    done = run(resumed, rows, output_dir=str(folder), max_steps=4, save_steps=2)
    assert [record["step"] for record in done.records] == [1, 2, 3, 4]  # two of them as they were
    assert (folder / "config.yaml").read_text() == own
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_an_objective_that_computes_no_loss_keeps_no_run_from_resuming(make_accelerator, monkeypatch, caplog):
    monkeypatch.setattr(run_state, "DistributedDataParallel", nn.Module)
    model, batch = make_classifier(), default_collate(make_rows(2))
    del batch["labels"], batch["idx"]
    run_state.settle_buckets(make_accelerator(), model, TaskLoss(), batch)
    assert "the first step after resuming may differ in its last bits" in caplog.text
    assert "has no loss" in caplog.text


@pytest.mark.parametrize(
    ("others", "parts", "message"),
    [
        (nn.Linear(2, 2), {}, r"has 2 parameters that are not the model's, expected none"),
        (
            nn.Identity(),
            {"head": nn.Linear(2, 2)},
            r"the state of 'head' cannot be saved: .* Expected plain JSON",
        ),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused_before_training(run, others, parts, message):
    def groups(model):
        return [*model.parameters(), *others.parameters()]

    with pytest.raises(ConfigError, match=message):
        run(make_classifier(), make_rows(4), groups=groups, parts=parts)


def test_a_checkpoint_with_averages_sums_the_weights_once(run, tmp_path, monkeypatch):
    sums, sum_of_bits = [], state.sum_of_bits
    monkeypatch.setattr(state, "sum_of_bits", lambda runs: sums.append(sum_of_bits(runs)) or sums[-1])
    folder = tmp_path / "averaged"
    run(
        make_classifier(),
        make_rows(8),
        rule=swaft.SWA(start=0),
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
    )
    for path, each in zip(sorted(folder.glob("checkpoint-*")), sums, strict=True):
        written = [json.loads((path / part / "manifest.json").read_text()) for part in (".", "average")]
        assert [found["content"]["weights"] for found in written] == [str(each)] * 2
    assert sums[0] != sums[1]


def test_each_step_uses_the_rate_of_the_schedule_once(run):
    done = run(
        make_classifier(),
        make_rows(8),
        gradient_accumulation_steps=2,
        max_steps=4,
        lr_scheduler_type="linear",
        warmup_steps=0,
        learning_rate=1.0,
    )
    assert [record["learning_rate"] for record in done.records] == [1.0, 0.75, 0.5, 0.25]


def test_groups_with_different_rates_keep_their_ratio_to_the_setting_also_after_resuming(run, tmp_path):
    def groups(model):
        return [{"params": model.head.parameters(), "lr": 0.4}, {"params": model.embedding.parameters()}]

    unbroken, resumed, rows = make_classifier(), make_classifier(), make_rows(8)
    folder = str(tmp_path / "run")
    for model in (unbroken, resumed):  # the second one resumes where half of the steps are done
        done = run(model, rows, groups=groups, output_dir=folder, max_steps=4, warmup_steps=2, save_steps=2)
        assert [record["learning_rate"] for record in done.records] == pytest.approx([0.0, 0.2, 0.4, 0.2])
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_noise_objective_that_the_loop_does_not_call_is_refused_after_the_first_step(run, tmp_path):
    with pytest.raises(ConfigError, match=r"noise\.kind is rdrop, but the first step .* noise\.kind=none"):
        run(
            make_classifier(),
            make_rows(8),
            objective=swaft.RDrop(),
            called=TaskLoss(),
            output_dir=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_ctrl_c_tells_of_the_newest_checkpoint_if_there_is_one_to_resume_from(run):
    class Interrupted(TaskLoss):
        def __call__(self, model, batch):
            self.step += 1
            if self.step == 3:
                raise KeyboardInterrupt
            return super().__call__(model, batch)

    told = {}
    for settings in (
        {"save_steps": 2},
        {"save_steps": 100},
        {"save_steps": 2, "resume_from_checkpoint": "none"},
    ):
        with pytest.raises(KeyboardInterrupt) as raised:
            run(make_classifier(), make_rows(10), objective=Interrupted(), max_steps=4, **settings)
        told[tuple(settings.values())] = getattr(raised.value, "__notes__", [])
    resumes = "when started again, the run resumes from its newest checkpoint"
    assert told == {(2,): [resumes], (100,): [], (2, "none"): []}


def test_max_steps_ends_the_run_inside_an_epoch(run):
    done = run(make_classifier(), make_rows(10), max_steps=3)
    assert done.position.step == len(done.records) == 3


def test_gradients_are_clipped_and_their_norm_before_clipping_is_logged(run):
    model, rows = make_classifier(), make_rows(4)
    before = copy.deepcopy(model)
    done = run(model, rows, max_steps=1, max_grad_norm=1e-3, learning_rate=1.0, warmup_steps=0)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert done.records[0]["grad_norm"] > 1e-2


def test_a_limit_of_zero_clips_nothing(run):
    model, rows = make_classifier(), make_rows(4)
    expected = by_hand(copy.deepcopy(model), rows, accumulation=1, rates=[1.0], max_grad_norm=float("inf"))
    run(model, rows, max_steps=1, max_grad_norm=0.0, learning_rate=1.0, warmup_steps=0)
    torch.testing.assert_close(model.head.weight, expected.head.weight)


def test_a_loss_that_is_not_finite_stops_training_before_the_step_is_taken(run):
    model = make_classifier()
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(model, batch):
        out = TaskLoss()(model, batch)
        seen.append(copy.deepcopy(model.state_dict()))
        if len(seen) == 3:  # the first micro-batch of step 2; noticed before that step's only update
            out = SimpleNamespace(**{**vars(out), "loss": out.loss * float("nan")})
        return out

    with pytest.raises(
        TrainingError, match=r"step 2 is not finite \(learning rate 0\.1, mixed precision no\)"
    ):
        run(
            model,
            make_rows(8),
            objective=poisoned,
            gradient_accumulation_steps=2,
            warmup_steps=0,
            lr_scheduler_type="constant",
        )
    assert len(seen) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[2][name])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_loss_is_read_once_backward_is_queued_and_never_averaged_or_saved(
    run, accumulation, monkeypatch, tmp_path
):
    """Also under an engine whose backward takes the optimizer step, and where the weights stay finite."""
    order, members, backward, read = [], [], Accelerator.backward, SentCount.read

    def stepping(accelerator, loss):
        backward(accelerator, loss)
        order.append("backward")
        if accelerator.sync_gradients:
            optimizer = accelerator._optimizers[0].optimizer
            optimizer.step()
            optimizer.zero_grad()
            members.append([parameter.detach().clone() for parameter in accelerator._models[0].parameters()])

    def noted(sent):
        order.append("read")
        return read(sent)

    def third_step_is_infinite(model, batch):
        out = TaskLoss()(model, batch)
        bad = len(members) == 2
        return SimpleNamespace(**{**vars(out), "loss": out.loss + torch.inf if bad else out.loss})

    monkeypatch.setattr(Accelerator, "backward", stepping)
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda _: None)
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.AdamW)  # of which a checkpoint has a state to save
    monkeypatch.setattr(SentCount, "read", noted)
    attached, attach = [], swaft.WeightAverager
    monkeypatch.setattr(
        swaft, "WeightAverager", lambda *a, **o: attached.append(attach(*a, **o)) or attached[0]
    )
    with pytest.raises(
        TrainingError, match=r"step 3 is not finite .* nothing of the step was averaged or saved"
    ):
        run(
            make_classifier(),
            make_rows(12),
            objective=third_step_is_infinite,
            rule=swaft.SWA(start=1),
            gradient_accumulation_steps=accumulation,
            save_steps=1,
            num_train_epochs=2.0,
        )
    assert order == ([*["backward"] * accumulation, "read"]) * 3
    assert len(members) == 3
    assert not torch.equal(members[2][0], members[1][0])
    attached[0].wait()
    assert attached[0].num_averaged == 2
    checkpoints = {path.name for path in tmp_path.glob("**/checkpoint-*")}
    assert checkpoints == {"checkpoint-1", "checkpoint-2"}


def test_the_averager_sees_every_optimizer_step_and_no_micro_batch(run):
    done = run(
        make_classifier(),
        make_rows(8),
        gradient_accumulation_steps=2,
        num_train_epochs=2.0,
        rule=swaft.SWA(start=1, every=1),
    )
    assert done.averager.applied_steps == done.position.step == 4
    assert done.averager.num_averaged == 4


def test_evaluation_in_between_changes_nothing_in_training(run):
    rows = make_rows(8)
    plain, watched = make_classifier(dropout=True), make_classifier(dropout=True)
    run(plain, rows, rule=swaft.SWA(start=1))
    evaluated = []

    def evaluate(split: str, readout: object) -> dict[str, Evaluation]:
        evaluated.append((split, readout))
        watched.eval()
        watched(**{name: value for name, value in default_collate(rows).items() if name != "idx"})
        watched.train()
        return {"last": Evaluation(scores={"accuracy": 0.5})}

    done = run(
        watched,
        rows,
        rule=swaft.SWA(start=1),
        evaluate=evaluate,
        evaluation=ClassificationEvalConfig(eval_steps=5),
    )
    assert (
        evaluated == [("validation", swaft.Readout())] * 2
    )  # not after the last of 12 steps, when the run is evaluated anyway
    assert not done.position.stopped
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_logged_losses_are_means_over_the_micro_batches_since_the_last_line(run):
    frozen = {
        "learning_rate": 1e-30,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1.0,
    }
    each = run(make_classifier(), make_rows(8), **frozen).records
    both = run(make_classifier(), make_rows(8), **frozen, logging_steps=2).records
    losses = [record["loss"] for record in each]
    assert [record["step"] for record in both] == [2, 4]
    assert both[1]["loss"] == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-12)


def test_an_evaluation_that_says_so_ends_the_run(run):
    done = run(
        make_classifier(),
        make_rows(8),
        rule=swaft.SWA(start=1),
        evaluate=lambda split, readout: {
            kind: Evaluation(scores={"accuracy": 0.5}) for kind in ("last", "averaged")
        },
        evaluation=ClassificationEvalConfig(eval_steps=2, early_stopping_patience=1),
        num_train_epochs=3.0,
    )
    assert (done.position.step, done.steps) == (4, 4)  # the second evaluation is no better than the first
    assert done.position.stopped
    assert done.averager.num_averaged == 4
