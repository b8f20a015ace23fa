"""Tiny models with LoRA, and the mean of their updates taken densely, in float64, by peft's own account."""

from __future__ import annotations

import copy
import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from small_runs import attached
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from swaft.averaging.rules import LAWA

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.Unflatten(1, (2, 4)), nn.Conv2d(2, 6, (2, 3)))


MODELS = {
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "rslora": (bert, {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "value"],
            "rank_pattern": {"layer.0.attention.self.query": 3},
            "alpha_pattern": {"value": 32, "layer.1.attention.self.query": 1},
        },
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "convolutions": (convolutions, {"target_modules": ["0", "2"]}),
}


def adapted(kind="bert", *, rank=2, **changes):
    make, options = MODELS[kind]
    torch.manual_seed(1)
    return get_peft_model(make(), LoraConfig(r=rank, **{**options, **changes}))


def train(model, *, rule=None, steps=6, moving=lambda name: True):
    """Random steps; returns the averager and the parameters after every step, the first before them all."""
    torch.manual_seed(2)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, averager = attached(model, rule=rule or LAWA(last=4), total_steps=steps, lr=0.3)
    recorded = [{name: p.detach().clone() for name, p in trainable.items()}]
    for _ in range(steps):
        for name, parameter in trainable.items():
            parameter.grad = torch.randn_like(parameter) if moving(name) else torch.zeros_like(parameter)
        optimizer.step()
        averager.step()
        recorded.append({name: p.detach().clone() for name, p in trainable.items()})
    return averager, recorded


@torch.no_grad()
def updates(model, weights=None):
    """Every dense update, in float64, as peft computes it, once `weights` are in the model."""
    exact = copy.deepcopy(model).double()
    parameters = dict(exact.named_parameters())
    for name, tensor in (weights or {}).items():
        parameters[name].copy_(tensor)
    return {
        f"{name.removeprefix('base_model.model.')}:{adapter}": layer.get_delta_weight(adapter)
        for name, layer in exact.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.r
    }


def mean(dicts):
    return {name: sum(each[name] for each in dicts) / len(dicts) for name in dicts[0]}


def mean_update(model, recorded):
    return mean([updates(model, weights) for weights in recorded])


def mean_factors(recorded):
    return mean([{name: tensor.double() for name, tensor in weights.items()} for weights in recorded])


def relative(found, expected):
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


def overall(found, expected):
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(each.square().sum()) for each in expected.values())) ** 0.5


def loaded(kind, folder):
    return PeftModel.from_pretrained(MODELS[kind][0](), folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def written_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())
