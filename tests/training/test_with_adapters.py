"""LoRA on the models of the recipes: what trains, what is saved, and what noise makes of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import swaft
from swaft.averaging import attach_engine, save_pretrained
from swaft.errors import ConfigError
from swaft.noise import TaskLoss
from swaft.training.config import ModelConfig
from swaft.training.models.build import count_parameters
from swaft.training.models.pretrained import with_adapters

pytestmark = pytest.mark.unit

CLASSES = {"vocab_size": 40, "num_labels": 3}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Quantizer:
    """As transformers leaves one on a model of which it keeps the quantised weights."""

    quantization_config = SimpleNamespace(quant_method="bitsandbytes")

    def __init__(self, *, is_trainable: bool):
        self.is_trainable, self.is_qat_trainable = is_trainable, False


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("use_peft", [True, False])
def test_quantised_weights_are_trained_only_through_adapters_that_get_gradients(is_trainable, use_peft):
    model: Any = bert()
    model.hf_quantizer = Quantizer(is_trainable=is_trainable)
    settings = ModelConfig(model_name_or_path="some/model", use_peft=use_peft)
    if is_trainable and use_peft:
        with_adapters(model, settings, task="sequence classification")
        return
    with pytest.raises(
        ConfigError, match=r"its weights are quantised \(bitsandbytes\), which have no gradients"
    ):
        with_adapters(model, settings, task="sequence classification")


def bert():
    return BertForSequenceClassification(BertConfig(**CLASSES, **BERT))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**CLASSES, **BERT, pad_token_id=0))


def distilbert():
    config = DistilBertConfig(
        **CLASSES, dim=16, n_layers=2, n_heads=2, hidden_dim=24, dropout=0.0, seq_classif_dropout=0.0
    )
    return DistilBertForSequenceClassification(config)


def bart():
    layers = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = BartConfig(**CLASSES, d_model=16, dropout=0.0, pad_token_id=0, eos_token_id=2, **layers)
    return BartForSequenceClassification(config)


def questions():
    return BertForQuestionAnswering(BertConfig(vocab_size=40, **BERT))


def t5():
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


CLASSIFY, ANSWER, WRITE = "sequence classification", "question answering", "sequence to sequence"
MODELS = {
    "bert": (bert, CLASSIFY, {"classifier"}),
    "roberta": (roberta, CLASSIFY, {"classifier"}),
    "distilbert": (distilbert, CLASSIFY, {"pre_classifier", "classifier"}),
    "bart": (bart, CLASSIFY, {"classification_head"}),
    "questions": (questions, ANSWER, {"qa_outputs"}),
    "t5": (t5, WRITE, set()),
}


def settings(**changes) -> ModelConfig:
    options = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0, **changes}
    return ModelConfig(model_name_or_path="unused", **options)


def adapted(kind: str, *, checkpointing: bool = False, **changes):
    torch.manual_seed(0)
    make, task, _ = MODELS[kind]
    model = make()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return with_adapters(model, settings(lora_target_modules="all-linear", **changes), task=task)


def batch_for(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (4, 7), generator=generator)
    ids[:, -1] = 2  # BART classifies the end of a text
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "questions":
        return batch | {
            "start_positions": torch.tensor([1, 2, 3, 0]),
            "end_positions": torch.tensor([2, 2, 5, 0]),
        }
    return batch | {"labels": ids[:, 2:].contiguous() if kind == "t5" else torch.tensor([0, 1, 2, 1])}


def train(model, batch, *, objective=None, rule=None, steps=3):
    """A few steps; returns the engine, or the averager where weights are averaged."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    averager = rule and swaft.WeightAverager(model, optimizer, rule=rule, total_steps=steps)
    objective = objective or TaskLoss()
    model.train()
    for _ in range(steps):
        objective(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if averager:
            averager.step()
    return averager or attach_engine(model, optimizer)


def outputs(model, batch) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**batch)
    return output.logits if hasattr(output, "logits") else output.start_logits


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_and_a_new_head_train_and_nothing_else(kind):
    model = adapted(kind)
    heads = MODELS[kind][2]
    before = copy.deepcopy(model.state_dict())
    train(model, batch_for(kind))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name or ".modules_to_save." in name for name in moved)
    assert {
        name.split(".modules_to_save.")[0].split(".")[-1] for name in moved if "lora_" not in name
    } == heads
    assert not any("lora_" in name and head in name for name in moved for head in heads)
    count = count_parameters(model)
    assert 0 < count.trainable < count.total
    assert str(count).startswith(f"{count.trainable:,} of {count.total:,} (")


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_folder_is_an_adapter_that_peft_puts_on_the_untouched_model(kind, tmp_path):
    torch.manual_seed(0)
    base = MODELS[kind][0]()
    model, batch = adapted(kind), batch_for(kind)
    averager = train(model, batch, rule=swaft.SWA(start=1))
    averager.save_pretrained(tmp_path / "averaged")
    save_pretrained(averager.engine, tmp_path / "last")
    last = outputs(model, batch)
    with averager.swapped_in():
        averaged = outputs(model, batch)
    assert not torch.allclose(last, averaged, atol=1e-4)
    for folder, expected in (("last", last), ("averaged", averaged)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(outputs(loaded, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(kind, checkpointing=checkpointing)
        model.train()
        swaft.R3F(sigma=1e-2, seed=1)(model, batch_for(kind)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", [swaft.R3F, swaft.RDrop])
def test_noise_reaches_a_model_with_adapters(kind, objective):
    model, batch = adapted(kind, lora_dropout=0.1), batch_for(kind)
    loss = objective(weight=1.0, **({"sigma": 1e-2} if objective is swaft.R3F else {}))
    loss.prepare_model(model)
    train(model, batch, objective=loss)  # B of B·A begins at 0, and with it the difference of two masks
    model.train()
    out = loss(model, batch)
    assert out.divergence > 0
    assert (out.changed > 0) == (objective is swaft.R3F)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bart"])
def test_r4f_normalises_the_head_that_trains_and_saves_the_plain_weights(kind, tmp_path):
    torch.manual_seed(0)
    base = MODELS[kind][0]()
    model, batch = adapted(kind), batch_for(kind)
    objective = swaft.R4F(sigma=1e-2)
    objective.prepare_model(model)
    averager = train(model, batch, objective=objective, rule=swaft.SWA(start=1))
    averager.save_pretrained(tmp_path / "averaged")
    with averager.swapped_in():
        expected = outputs(model, batch)
    loaded = PeftModel.from_pretrained(base, tmp_path / "averaged")
    torch.testing.assert_close(outputs(loaded, batch), expected, rtol=1e-5, atol=1e-6)
    heads = [
        part for name, part in loaded.named_modules()
        if ".modules_to_save.default" in name and isinstance(part, nn.Linear)
    ]  # fmt: skip
    for head in heads:
        assert torch.linalg.matrix_norm(head.weight, 2).item() == pytest.approx(1.0, rel=0.3)  # from 0.1


def test_without_being_asked_for_nothing_changes():
    model = bert()
    assert with_adapters(model, ModelConfig(model_name_or_path="unused"), task=CLASSIFY) is model


def test_layers_that_there_are_not_are_refused_with_those_that_there_are():
    wrong = settings(lora_target_modules="q_proj, v_proj")
    with pytest.raises(ConfigError, match=r"q_proj, v_proj fits no layer of BertFor.*some of .*query, value"):
        with_adapters(bert(), wrong, task=CLASSIFY)
    with pytest.raises(ConfigError, match=r"null fits no layer of DistilBertFor.*q_lin"):
        with_adapters(distilbert(), settings(), task=CLASSIFY)
