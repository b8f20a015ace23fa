"""What ends a run: parts that no checkpoint could hold, noise that is never asked for, a bad loss."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tiny_training import make_classifier, make_rows
from torch import nn

import swaft
from swaft.errors import ConfigError, TrainingError
from swaft.noise import TaskLoss
from swaft.noise.passes import SentCount

pytestmark = pytest.mark.unit


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
