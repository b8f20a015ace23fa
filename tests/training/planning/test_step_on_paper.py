"""A step on tensors without data against the same step with data: equal bytes where they are most."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import swaft
from swaft.errors import ConfigError
from swaft.noise import TaskLoss
from swaft.training.config import TrainConfig
from swaft.training.models.pretrained import with_checkpointing
from swaft.training.planning.step import (
    LiveBytes,
    PlannedModel,
    _without_dropout,
    trace_step,
    trace_training_step,
)

pytestmark = pytest.mark.unit

BERT = {
    "model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 60, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 60, "n_embd": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0,
}  # fmt: skip


def build(settings):
    config = AutoConfig.for_model(**settings)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForSequenceClassification
    return kind.from_config(config, dtype=torch.float32)


def batch(settings, rows=2, length=12):
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -2:] = 0
    # Of more than one class: else a noise objective proves itself on every batch again.
    labels = torch.arange(6 * rows).view(rows, 6) if settings is T5 else torch.arange(rows) % 2
    return {"input_ids": mask + 1, "attention_mask": mask, "labels": labels}


def engine(**changed):
    how = {"casting": "none", "dtype": torch.float32, "on_cpu": True} | changed
    return SimpleNamespace(**how, blocks=lambda model: [0] * len(list(model.parameters())))


def on_paper(settings, objective, *, gradient_checkpointing=False, **changed):
    train = TrainConfig(output_dir="none", gradient_checkpointing=gradient_checkpointing)
    planned = PlannedModel(lambda: build(settings), lambda: batch(settings))
    return trace_training_step(planned, objective, train, engine(**changed))


def activations(*how, **changed):
    return on_paper(*how, **changed)[1]


def with_data(settings, objective, *, gradient_checkpointing=False):
    model = with_checkpointing(build(settings), gradient_checkpointing).train()
    objective.prepare_model(model)
    rows = batch(settings)
    objective(model, rows)  # a noise objective proves itself on the first batch
    return trace_step(model, lambda: objective(model, rows))


@pytest.mark.parametrize("settings", [BERT, T5], ids=["bert", "t5"])
@pytest.mark.parametrize("objective", [TaskLoss, swaft.R3F], ids=["task", "r3f"])
def test_a_step_without_data_takes_what_the_same_step_takes_with_data(settings, objective):
    assert activations(settings, objective()) == with_data(settings, objective())


def test_checkpointing_counts_what_is_kept_and_what_is_made_again():
    planned = activations(BERT, TaskLoss(), gradient_checkpointing=True)
    assert planned == with_data(BERT, TaskLoss(), gradient_checkpointing=True)
    kept = activations(BERT, TaskLoss())
    assert planned < kept


def test_weights_that_are_cast_halve():
    planned, _ = on_paper(BERT, TaskLoss(), casting="weights", dtype=torch.bfloat16)
    assert {weight.itemsize for weight in planned} == {2}
    whole, _ = on_paper(BERT, TaskLoss())
    assert {weight.itemsize for weight in whole} == {4}


def test_attention_on_a_gpu_keeps_no_matrix_of_weights():
    on_cpu = activations(BERT, TaskLoss())
    on_gpu = activations(BERT, TaskLoss(), on_cpu=False)
    assert on_gpu < on_cpu


def test_dropout_of_attention_is_left_out_by_position_and_by_name():
    asked = []
    fused = _without_dropout(lambda *args, **kwargs: asked.append((args, kwargs)))
    fused(1, 2, 3, None, 0.1, True)
    fused(1, 2, 3, dropout_p=0.1, is_causal=True)
    assert asked == [((1, 2, 3, None, 0.0, True), {}), ((1, 2, 3, None, 0.0), {"is_causal": True})]


def test_a_checkpointed_forward_that_runs_again_takes_the_same_kernels_on_a_gpu():
    how = {"casting": "weights", "dtype": torch.bfloat16, "on_cpu": False}
    again = activations(GPT2, TaskLoss(), gradient_checkpointing=True, **how)
    kept = activations(GPT2, TaskLoss(), **how)
    assert again < kept


def test_a_model_whose_shapes_depend_on_the_data_is_refused_with_the_operation():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask, labels):
            seen = self.layer(input_ids.float()[:, :4])[attention_mask[:, 0].bool()]
            return SimpleNamespace(loss=seen.sum(), logits=seen)

    with pytest.raises(ConfigError, match=r"aten\.(nonzero|index)"):
        trace_training_step(
            PlannedModel(Picky, lambda: batch(BERT)), TaskLoss(), TrainConfig(output_dir="none"), engine()
        )


def test_a_storage_counts_once_and_until_it_is_freed():
    with LiveBytes() as memory:
        tensor = torch.zeros(10)
        view = tensor[2:]
        assert memory.live == 40
        copied = view.clone()
        assert (memory.live, memory.peak) == (72, 72)
        del tensor, view
        assert memory.live == 32
        assert memory.peak == 72
    del copied
