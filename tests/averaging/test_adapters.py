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
from small_runs import moved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import swaft
from swaft.averaging import lora, save_pretrained
from swaft.averaging.rules import LAWA

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


def trained(variant, rule):
    make, config = VARIANTS[variant]
    torch.manual_seed(1)
    model = get_peft_model(make(), config)
    return model, moved(model, rule, steps=3)


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


def opened_as_its_card_says(folder, monkeypatch, before=""):
    """The model, by the Python code in the folder's model card, run next to the folder."""
    monkeypatch.chdir(folder.parent)
    parts = (folder / "README.md").read_text().split("```python\n")[1:]
    found = {}
    exec(before + "".join(part.split("```")[0] for part in parts), found)
    return found["model"]


def saved_three_ways(model, folder):
    """Folders of the last weights, the mean of the factors, and the mean of the updates."""
    averager = moved(model, LAWA(last=2))
    last, factors, updates = (folder / name for name in ("last", "factors", "updates"))
    save_pretrained(averager.engine, last)
    averager.save_pretrained(factors)
    lora.product_mean(averager).save_adapter(updates)
    return last, factors, updates


def test_the_card_of_a_classifier_opens_its_adapter_with_the_names_of_its_classes(tmp_path, monkeypatch):
    names = {0: "sports", 1: 'the "news"', 2: "it's art\n"}
    body = bert().base_model
    body.config.num_labels = 2
    body.save_pretrained(tmp_path / "body")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3, id2label=names)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    folders = saved_three_ways(model, tmp_path)
    for folder in folders:
        opened = opened_as_its_card_says(folder, monkeypatch)
        assert opened.config.id2label == names
        assert not {"config.json", "generation_config.json"} & {path.name for path in folder.iterdir()}
    assert torch.equal(logits(opened_as_its_card_says(folders[0], monkeypatch)), logits(model))


def test_an_adapter_of_a_writer_keeps_how_the_model_generates(tmp_path, monkeypatch):
    gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    # A fault that transformers refuses to save, but reads.
    base.generation_config.update(eos_token_id=[0, 7], forced_bos_token_id=5, temperature=0.9)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    for folder in saved_three_ways(model, tmp_path):
        assert not (folder / "config.json").exists()
        load = "from peft import AutoPeftModelForCausalLM as A\n"
        load += f"model = A.from_pretrained({folder.name!r})\n"
        opened = opened_as_its_card_says(folder, monkeypatch, load)
        opened.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=1)
        used = opened.get_base_model().generation_config
        assert (used.eos_token_id, used.forced_bos_token_id) == ([0, 7], 5)
