from __future__ import annotations

import pytest
import torch
from tiny_models import generation_batch, t5
from transformers.modeling_outputs import Seq2SeqLMOutput

from swaft.errors import ConfigError, NoiseError
from swaft.noise import R3F, TaskLoss

pytestmark = pytest.mark.unit


@pytest.fixture
def model():
    return t5(dropout=0.0)


@pytest.fixture
def batch():
    return generation_batch()


def test_smoothing_is_over_the_whole_vocabulary_and_the_counted_tokens(model, batch):
    share = 0.1
    out = TaskLoss(share)(model, batch)
    log_p = model(**batch).logits.double().log_softmax(-1)
    counted = batch["labels"] != -100
    right = log_p.gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    expected = -((1 - share) * right + share * log_p.mean(-1))[counted].mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.task_loss.item() == out.loss.item()


def test_a_share_near_zero_is_the_plain_loss(model, batch):
    assert TaskLoss(1e-9)(model, batch).loss.item() == pytest.approx(
        TaskLoss()(model, batch).loss.item(), rel=1e-6
    )


def test_it_is_the_task_loss_of_a_noise_objective_with_the_same_smoothing(model, batch):
    smoothed = TaskLoss(0.2)(model, batch)
    r3f = R3F(label_smoothing=0.2)(model, batch)
    assert smoothed.task_loss.item() == pytest.approx(r3f.task_loss.item(), rel=1e-6)


def test_a_model_that_trains_another_loss_is_refused(model, batch, monkeypatch):
    plain = model.forward

    def doubled(**inputs):
        output = plain(**inputs)
        if output.loss is not None:
            output.loss = 2 * output.loss
        return output

    monkeypatch.setattr(model, "forward", doubled)
    with pytest.raises(NoiseError, match="label smoothing computes the mean cross entropy"):
        TaskLoss(0.1)(model, batch)


def test_the_plain_loss_needs_no_logits(model, batch, monkeypatch):
    loss = model(**batch).loss
    monkeypatch.setattr(model, "forward", lambda **inputs: Seq2SeqLMOutput(loss=loss))
    out = TaskLoss()(model, batch)
    assert torch.equal(out.loss, loss)
    assert out.logits is None


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="label_smoothing is 1"):
        TaskLoss(1.0)
