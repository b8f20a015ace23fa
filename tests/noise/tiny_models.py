"""Random Hugging Face models of a few thousand weights, batches for them, and one step on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 60


def bert(kind: type = BertForSequenceClassification, **options: Any) -> Any:
    return _encoder_kind(BertConfig, kind, **options)


def roberta(kind: type = RobertaForSequenceClassification, **options: Any) -> Any:
    return _encoder_kind(RobertaConfig, kind, **options)


def masked_bert(**options: Any) -> BertForMaskedLM:
    return bert(BertForMaskedLM, num_labels=1, **options)


def masked_roberta(**options: Any) -> RobertaForMaskedLM:
    return roberta(RobertaForMaskedLM, num_labels=1, **options)


def bart(
    kind: type = BartForConditionalGeneration, *, dropout: float = 0.1, seed: int = 0, **options: Any
) -> Any:
    return _bart_kind(BartConfig, kind, dropout, seed, **options)


def bart_classifier() -> BartForSequenceClassification:
    return bart(BartForSequenceClassification)


def t5(*, dropout: float = 0.1, tied: bool = True, seed: int = 0) -> T5ForConditionalGeneration:
    return _t5_kind(T5Config, T5ForConditionalGeneration, dropout, seed, tie_word_embeddings=tied)


def untied_t5(*, dropout: float = 0.1, seed: int = 0) -> T5ForConditionalGeneration:
    return t5(dropout=dropout, tied=False, seed=seed)


def mt5(*, dropout: float = 0.1, seed: int = 0) -> MT5ForConditionalGeneration:
    return _t5_kind(MT5Config, MT5ForConditionalGeneration, dropout, seed, feed_forward_proj="gated-gelu")


def t5_with_adapters(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> Any:
    """LoRA on the attention of an untied T5; peft needs one that has read its weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"], lora_dropout=dropout)
    for name, value in options.items():
        setattr(config, name, value)
    return get_peft_model(untied_t5(dropout=dropout, seed=seed), config).train()  # type: ignore[arg-type]


def t5_with_a_frozen_head(*, dropout: float = 0.1, seed: int = 0) -> T5ForConditionalGeneration:
    model = untied_t5(dropout=dropout, seed=seed)
    model.lm_head.requires_grad_(False)
    return model


def biased_bart(*, dropout: float = 0.1, seed: int = 0) -> BartForConditionalGeneration:
    """A BART whose buffer of biases is not zero, as in checkpoints converted from fairseq."""
    return _biased(bart(dropout=dropout, seed=seed))


def mbart(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> MBartForConditionalGeneration:
    return _bart_kind(MBartConfig, MBartForConditionalGeneration, dropout, seed, **options)


def blenderbot(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> BlenderbotForConditionalGeneration:
    return _bart_kind(BlenderbotConfig, BlenderbotForConditionalGeneration, dropout, seed, **options)


def pegasus(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> PegasusForConditionalGeneration:
    return _biased(_bart_kind(PegasusConfig, PegasusForConditionalGeneration, dropout, seed, **options))


def marian(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> MarianMTModel:
    return _biased(
        _bart_kind(
            MarianConfig, MarianMTModel, dropout, seed, pad_token_id=1, decoder_start_token_id=1, **options
        )
    )


def m2m100(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> M2M100ForConditionalGeneration:
    """A model that shifts its labels, and has no method that does."""
    others = ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    options |= dict.fromkeys(others, dropout)  # not 0 unless told
    return _bart_kind(M2M100Config, M2M100ForConditionalGeneration, dropout, seed, **options)


def opt(*, dropout: float = 0.1, seed: int = 0) -> OPTForCausalLM:
    """A model that calls its decoder past the module around it."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        dropout=dropout,
    )
    return OPTForCausalLM(config).train()


def gpt2(*, dropout: float = 0.1, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
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
    return GPT2LMHeadModel(config).train()


def llama(*, dropout: float = 0.1, seed: int = 0) -> LlamaForCausalLM:
    return _llama_kind(LlamaConfig, LlamaForCausalLM, dropout, seed)


def qwen2(*, dropout: float = 0.1, seed: int = 0) -> Qwen2ForCausalLM:
    return _llama_kind(Qwen2Config, Qwen2ForCausalLM, dropout, seed, tie_word_embeddings=True)


def gemma2(*, dropout: float = 0.1, seed: int = 0) -> Gemma2ForCausalLM:
    """A Gemma whose soft-cap is near enough to its logits to bend them."""
    return _llama_kind(
        Gemma2Config, Gemma2ForCausalLM, dropout, seed, head_dim=8, final_logit_softcapping=0.5
    )


def gemma3(*, dropout: float = 0.1, seed: int = 0) -> Gemma3ForConditionalGeneration:
    """A Gemma with a vision tower, whose layers come first and do not run over text."""
    torch.manual_seed(seed)
    body = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 8, "attention_dropout": dropout}
    image = {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=body | text, vision_config=body | image, image_token_index=3)
    return Gemma3ForConditionalGeneration(config).train()


def mixtral(*, dropout: float = 0.1, seed: int = 0, **options: Any) -> MixtralForCausalLM:
    return _llama_kind(MixtralConfig, MixtralForCausalLM, dropout, seed, num_local_experts=4, **options)


def cohere(*, dropout: float = 0.1, seed: int = 0) -> CohereForCausalLM:
    return _llama_kind(CohereConfig, CohereForCausalLM, dropout, seed, logit_scale=0.3)


def granite(*, dropout: float = 0.1, seed: int = 0) -> GraniteForCausalLM:
    return _llama_kind(GraniteConfig, GraniteForCausalLM, dropout, seed, logits_scaling=0.7)


def classification_batch(*, rows: int = 4, num_labels: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, VOCABULARY, (rows, 8), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 5:] = 0
    input_ids[0, 5:] = 1
    input_ids[:, -1] = 2  # BART reads the answer off its end-of-sequence token, one in every row
    labels = torch.randint(0, num_labels, (rows,), generator=generator)
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


def _t5_kind(config: type, kind: type, dropout: float, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(
        config(
            vocab_size=VOCABULARY,
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
    ).train()


def _bart_kind(config: type, kind: type, dropout: float, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(
        config(
            vocab_size=VOCABULARY,
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
    ).train()


def _llama_kind(config: type, kind: type, dropout: float, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(
        config(
            vocab_size=VOCABULARY,
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
    ).train()


def _biased(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    return model


def _encoder_kind(
    config: type, kind: type, *, dropout: float = 0.1, num_labels: int = 3, seed: int = 0
) -> Any:
    torch.manual_seed(seed)
    return kind(
        config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=num_labels,
        )
    ).train()
