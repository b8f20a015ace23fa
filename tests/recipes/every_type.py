"""Random models of any type of transformers, of a few thousand weights, from its configuration class alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def _each(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SMALL = (
    _each(
        "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim attention_hidden_size", 32
    )
    | _each("input_embedding_size output_embedding_size d_embed d_latents", 32)
    | _each("intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff d_inner hidden_dim", 48)
    | _each("ffn_hidden_size feed_forward_size moe_intermediate_size shared_expert_intermediate_size", 48)
    | _each("num_hidden_layers num_layers num_decoder_layers num_encoder_layers n_layer n_layers", 2)
    | _each("encoder_layers decoder_layers num_experts_per_tok", 2)
    | _each("num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads", 4)
    | _each("num_encoder_attention_heads num_decoder_attention_heads num_key_value_heads num_kv_heads", 4)
    | _each("n_routed_experts num_experts num_local_experts linear_num_value_heads linear_num_key_heads", 4)
    | _each("head_dim d_head d_kv attention_head_size attention_head_dim kv_channels index_head_dim", 8)
    | _each("qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim", 8)
    | _each("sliding_window attention_window window_size local_attention lsh_attn_chunk_length", 8)
    | _each("local_attn_chunk_length local_radius global_block_size", 8)
    | _each("kv_lora_rank q_lora_rank", 16)
    | _each("vocab_size decoder_vocab_size", 64)
    | _each("max_position_embeddings n_positions n_ctx max_seq_len", 128)
    | _each("max_encoder_position_embeddings max_decoder_position_embeddings", 128)
)
"""Entries of configurations, by what most of them call them."""

BLOCKS = {"block_size": 4, "num_random_blocks": 1}  # sparse from 29 tokens on
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16}
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
OF_TYPE: dict[str, dict[str, Any]] = {
    "axk1": {"n_group": 2, "topk_group": 1},
    "big_bird": BLOCKS,
    "bigbird_pegasus": BLOCKS,
    "canine": {"num_hash_buckets": 128, "local_transformer_stride": 8},
    "cohere_compass_text": {"rope_parameters": ROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "led": {"attention_window": [8, 8]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "markuplm": {"xpath_unit_hidden_size": 2},
    "mistral4": {"head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 32},
    "perceiver": {"num_latents": 16, "num_self_attends_per_block": 2},
    "qwen3_5_text": MIXED,
    "qwen3_next": MIXED,
    "reformer": {
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, **MAMBA},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "adapter_rank": 4,
        "mamba_d_state": 16,
        **MAMBA,
    },
}
"""What the sizes of a type have to be besides, to fit together."""


def tiny_config(kind: type[PreTrainedConfig], **entries: Any) -> Any:
    """A small configuration of that class; its parts are small, too.

    Args:
        kind: such as BertConfig.
        entries: of the configuration and its parts.
    """
    default = kind()
    known = default.to_dict()
    small = {name: size for name, size in SMALL.items() if isinstance(known.get(name, ""), int | None)}
    small |= OF_TYPE.get(kind.model_type, {})
    if known.get("is_encoder_decoder"):
        small["decoder_start_token_id"] = 3
    parts = {name: type(part) for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    small |= {name: tiny_config(part, **entries) for name, part in parts.items()}
    return kind(**(small | entries))
