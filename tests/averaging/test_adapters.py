"""Every kind of adapter: one alone is its own average, and what has no exact mean is averaged as weights."""

from __future__ import annotations

import pytest
import torch
from lora_models import bert, gpt2, logits
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file

import swaft
from swaft.averaging import lora, save_pretrained
from swaft.averaging.rules import LAWA
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit

TARGETS = {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "init_lora_weights": False}
PROMPTS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
LOW_RANK = {
    "lora": (bert, LoraConfig(**TARGETS)),
    "rslora": (bert, LoraConfig(**TARGETS, use_rslora=True)),
}
VARIANTS = LOW_RANK | {
    "dora": (bert, LoraConfig(**TARGETS, use_dora=True)),
    "ia3": (
        bert,
        IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"], task_type="SEQ_CLS"),
    ),
    "oft, which has buffers that are not saved": (
        bert,
        OFTConfig(r=0, oft_block_size=4, target_modules=["query"], task_type="SEQ_CLS", init_weights=False),
    ),
    "prompt tuning": (gpt2, PromptTuningConfig(**PROMPTS)),
    "prompt tuning of a classifier": (bert, PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")),
    "prefix tuning": (gpt2, PrefixTuningConfig(**PROMPTS)),
    "prefix tuning with a projection": (
        gpt2,
        PrefixTuningConfig(**PROMPTS, prefix_projection=True, encoder_hidden_size=8),
    ),
    "p-tuning": (gpt2, PromptEncoderConfig(**PROMPTS, encoder_hidden_size=8)),
    "p-tuning by an lstm": (
        gpt2,
        PromptEncoderConfig(**PROMPTS, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    ),
}


def trained(variant, rule, *, steps=3):
    make, config = VARIANTS[variant]
    torch.manual_seed(1)
    model = get_peft_model(make(), config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.3)
    averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=4)
    for _ in range(steps):
        for parameter in weights:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averager.step()
    return model, averager


def loaded(variant, folder):
    return PeftModel.from_pretrained(VARIANTS[variant][0](), folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_alone_gives_back_its_own_logits_bit_for_bit(variant, tmp_path):
    model, averager = trained(variant, LAWA(last=2, start=3))
    expected = logits(model)
    with averager.swapped_in():
        assert torch.equal(logits(model), expected)
    averager.save_pretrained(tmp_path / "average")
    save_pretrained(averager.engine, tmp_path / "last")
    for name in ("average", "last"):
        assert torch.equal(logits(loaded(variant, tmp_path / name)), expected)
    if variant in LOW_RANK:
        product = lora.product_mean(averager)
        product.save_adapter(tmp_path / "product")
        assert torch.equal(logits(loaded(variant, tmp_path / "product")), expected)
        assert (product.gap.overall, product.truncation.overall) == (0.0, 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder_of_an_average_answers_as_the_model_with_it_swapped_in(variant, tmp_path):
    model, averager = trained(variant, swaft.SWA(start=0))
    last = logits(model)
    averager.save_pretrained(tmp_path / "average")
    with averager.swapped_in():
        expected = logits(model)
        averager.save_pretrained(tmp_path / "from inside")
    assert not torch.equal(expected, last)
    assert torch.equal(logits(loaded(variant, tmp_path / "average")), expected)
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("average", "from inside")
    )
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert torch.equal(logits(model), last)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("dora", "is of the variant DoraLinearVariant"),
        ("ia3", "is peft's peft.tuners.ia3"),
        ("prompt tuning", "no LoRA factor is trained"),
        ("prefix tuning", "no LoRA factor is trained"),
    ],
)
def test_a_mean_of_updates_that_is_not_exact_is_refused_by_name(variant, said):
    _, averager = trained(variant, LAWA(last=2))
    with pytest.raises(AveragingError, match=said):
        lora.product_mean(averager)
