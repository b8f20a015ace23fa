"""Random Hugging Face models of a few thousand weights, batches for them, and one step on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 60


def built(kind: type, **options: Any) -> Any:
    """A model in training, the same at every call."""
    torch.manual_seed(0)
    return kind(kind.config_class(vocab_size=VOCABULARY, **options)).train()


def bert(
    kind: type = transformers.BertForSequenceClassification, *, dropout: float = 0.1, num_labels: int = 3
) -> Any:
    return built(
        kind,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
    )


def roberta(kind: type = transformers.RobertaForSequenceClassification, **options: Any) -> Any:
    return bert(kind, **options)


def masked_bert(**options: Any) -> Any:
    return bert(transformers.BertForMaskedLM, num_labels=1, **options)


def masked_roberta(**options: Any) -> Any:
    return bert(transformers.RobertaForMaskedLM, num_labels=1, **options)


def t5(kind: type = transformers.T5ForConditionalGeneration, *, dropout: float = 0.1, **options: Any) -> Any:
    return built(
        kind,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        **options,
    )


def untied_t5(**options: Any) -> Any:
    return t5(tie_word_embeddings=False, **options)


def mt5(**options: Any) -> Any:
    return t5(transformers.MT5ForConditionalGeneration, feed_forward_proj="gated-gelu", **options)


def t5_with_adapters(*, dropout: float = 0.1, **options: Any) -> Any:
    """LoRA on the attention of an untied T5; peft needs one that has read its weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"], lora_dropout=dropout)
    for name, value in options.items():
        setattr(config, name, value)
    return get_peft_model(untied_t5(dropout=dropout), config).train()


def t5_with_a_frozen_head(**options: Any) -> Any:
    model = untied_t5(**options)
    model.lm_head.requires_grad_(False)
    return model


def bart(
    kind: type = transformers.BartForConditionalGeneration, *, dropout: float = 0.1, **options: Any
) -> Any:
    return built(
        kind,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=dropout,
        num_labels=3,
        **options,
    )


def bart_classifier() -> Any:
    return bart(transformers.BartForSequenceClassification)


def biased_bart(**options: Any) -> Any:
    """A BART whose buffer of biases is not zero, as in checkpoints converted from fairseq."""
    return _biased(bart(**options))


def mbart(**options: Any) -> Any:
    return bart(transformers.MBartForConditionalGeneration, **options)


def blenderbot(**options: Any) -> Any:
    return bart(transformers.BlenderbotForConditionalGeneration, **options)


def pegasus(**options: Any) -> Any:
    return _biased(bart(transformers.PegasusForConditionalGeneration, **options))


def marian(**options: Any) -> Any:
    return _biased(bart(transformers.MarianMTModel, pad_token_id=1, decoder_start_token_id=1, **options))


def m2m100(*, dropout: float = 0.1, **options: Any) -> Any:
    """A model that shifts its labels, and has no method that does."""
    others = ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    options |= dict.fromkeys(others, dropout)  # not 0 unless told
    return bart(transformers.M2M100ForConditionalGeneration, dropout=dropout, **options)


def opt(*, dropout: float = 0.1) -> Any:
    """A model that calls its decoder past the module around it."""
    return built(
        transformers.OPTForCausalLM,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        dropout=dropout,
    )


def gpt2(kind: type = transformers.GPT2LMHeadModel, *, dropout: float = 0.1) -> Any:
    return built(
        kind,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
    )


def llama(kind: type = transformers.LlamaForCausalLM, *, dropout: float = 0.1, **options: Any) -> Any:
    return built(
        kind,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def qwen2(**options: Any) -> Any:
    return llama(transformers.Qwen2ForCausalLM, tie_word_embeddings=True, **options)


def gemma2(**options: Any) -> Any:
    """A Gemma whose soft-cap is near enough to its logits to bend them."""
    return llama(transformers.Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=0.5, **options)


def gemma3(*, dropout: float = 0.1) -> Any:
    """A Gemma with a vision tower, whose layers come first and do not run over text."""
    torch.manual_seed(0)
    body = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 8, "attention_dropout": dropout}
    image = {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=body | text, vision_config=body | image, image_token_index=3
    )
    return transformers.Gemma3ForConditionalGeneration(config).train()


def mixtral(**options: Any) -> Any:
    return llama(transformers.MixtralForCausalLM, num_local_experts=4, **options)


def cohere(**options: Any) -> Any:
    return llama(transformers.CohereForCausalLM, logit_scale=0.3, **options)


def granite(**options: Any) -> Any:
    return llama(transformers.GraniteForCausalLM, logits_scaling=0.7, **options)


def _biased(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    return model


def classification_batch(*, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (rows, 8), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 5:] = 0
    input_ids[0, 5:] = 1
    input_ids[:, -1] = 2  # BART reads the answer off its end-of-sequence token, one in every row
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def generation_batch(*, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = classification_batch(rows=rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(4, VOCABULARY, (rows, 6), generator=generator)
    labels[0, 4:] = -100
    return {**batch, "labels": labels}


def causal_batch(*, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A text that is its own label, but for a prompt and the padding."""
    batch = classification_batch(rows=rows, seed=seed)
    labels = batch["input_ids"].clone()
    labels[:, :2] = -100
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}


def run(objective: Any, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Any, dict]:
    """One call and its gradients, from a known random state."""
    model.zero_grad()
    torch.manual_seed(7)
    out = objective(model, batch)
    out.loss.backward()
    return out, gradients_of(model)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
