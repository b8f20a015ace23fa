"""The models and launch lines for which a plan is compared with what ranks really take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from swaft.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with random weights, and the shape of its batches."""

    config: dict[str, Any]
    """Entries of its transformers configuration."""
    rows: int
    """Rows of a batch."""
    length: int
    """Tokens of a row."""
    target_length: int = 0
    """Tokens of a target; 0: the model classifies."""
    gradient_checkpointing: bool = False

    def configuration(self) -> Any:
        """Return its transformers configuration."""
        return AutoConfig.for_model(**self.config)

    def build(self) -> Any:
        """Make it, fp32."""
        kind = AutoModelForSeq2SeqLM if self.target_length else AutoModelForSequenceClassification
        return kind.from_config(self.configuration(), dtype=torch.float32)

    def batch(self) -> dict[str, Tensor]:
        """Make a batch of random tokens in which one row is padded."""
        mask = torch.ones(self.rows, self.length, dtype=torch.int64)
        mask[0, -1] = 0
        labels = torch.randint(0, 2, (self.rows,))
        if self.target_length:
            labels = torch.randint(2, self.config["vocab_size"], (self.rows, self.target_length))
        tokens = torch.randint(2, self.config["vocab_size"], (self.rows, self.length))
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def train(self) -> TrainConfig:
        """The settings it is trained with."""
        return TrainConfig(
            output_dir="none",
            per_device_train_batch_size=self.rows,
            gradient_checkpointing=self.gradient_checkpointing,
        )


MODELS = {
    "BERT": Model(
        config={
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        },
        rows=4,
        length=64,
    ),
    "T5": Model(
        config={
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 384,
            "d_ff": 1536,
            "d_kv": 64,
            "num_layers": 5,
            "num_heads": 6,
            "decoder_start_token_id": 0,
        },
        rows=4,
        length=64,
        target_length=32,
    ),
    "GPT-2, checkpointed": Model(
        config={
            "model_type": "gpt2",
            "vocab_size": 8000,
            "n_embd": 512,
            "n_layer": 10,
            "n_head": 8,
            "pad_token_id": 0,
        },
        rows=4,
        length=128,
        gradient_checkpointing=True,
    ),
}
WARM_UP = Model(
    config={
        "model_type": "bert",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    rows=2,
    length=8,
)

LINES: dict[str, Sequence[str]] = {
    "one process": ("--config_file", "launch/accelerate/single.yaml"),
    "DDP, bf16": ("--config_file", "launch/accelerate/ddp_cpu.yaml", "--mixed_precision", "bf16"),
    "DDP": ("--config_file", "launch/accelerate/ddp_cpu.yaml"),
    "ZeRO-1": ("--config_file", "launch/accelerate/zero1_cpu.yaml"),
    "ZeRO-2": ("--config_file", "launch/accelerate/zero2_cpu.yaml"),
    "ZeRO-2, bf16": ("--config_file", "launch/accelerate/zero2_cpu.yaml", "--mixed_precision", "bf16"),
    "ZeRO-3": ("--config_file", "launch/accelerate/zero3_cpu.yaml"),
    "FSDP2": ("--config_file", "launch/accelerate/fsdp2_cpu.yaml"),
}
"""Launch lines without their script, by engine."""
