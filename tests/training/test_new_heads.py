"""What a task puts on a pretrained body is told apart from it, also where the body is not of one piece."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForQuestionAnswering

from swaft.training.config import ModelConfig
from swaft.training.models.pretrained import new_heads, with_adapters

pytestmark = pytest.mark.unit


def t5_for_questions() -> T5ForQuestionAnswering:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForQuestionAnswering(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


def test_a_body_in_pieces_is_no_head():
    assert new_heads(t5_for_questions()) == ["qa_outputs"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    assert new_heads(BertForSequenceClassification(BertConfig(vocab_size=40, **sizes))) == ["classifier"]


@pytest.mark.parametrize("layers", [None, "all-linear", "q,v"])
def test_a_t5_that_answers_questions_takes_adapters_and_trains_its_head(layers):
    settings = ModelConfig(model_name_or_path="unused", use_peft=True, lora_target_modules=layers)
    model = with_adapters(t5_for_questions(), settings, task="question answering")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("qa_outputs.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "qa_outputs" in name for name in trained)
    assert any(".q.lora_A" in name for name in trained)
