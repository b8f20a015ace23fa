"""A tiny classifier in a Trainer, dropout on, with an evaluation and a checkpoint in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from swaft.integrations.transformers import averaged_weights

STEPS = 8


def rows(number: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (number, 6), generator=generator)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": (ids[:, 0] % 3).tolist(),
        }
    )


def model(dropout: float = 0.1) -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 4,
    "logging_steps": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


def trainer(
    folder: Path, *callbacks: Any, kind: type[Trainer] = Trainer, dropout: float = 0.1, **settings: Any
) -> Trainer:
    return kind(
        model=model(dropout),
        args=TrainingArguments(str(folder), **(ARGUMENTS | settings)),
        train_dataset=rows(64, 0),
        eval_dataset=rows(16, 1),
        callbacks=list(callbacks),
    )


def exported(run: Trainer) -> dict[str, torch.Tensor]:
    """What training has left in final-averaged."""
    return load_file(Path(run.args.output_dir) / "final-averaged" / "model.safetensors")


def averaged(run: Trainer) -> dict[str, torch.Tensor]:
    """The averaged weights of a run."""
    with averaged_weights(run):
        return {name: value.clone() for name, value in run.model.named_parameters()}


def sft_trainer(folder: Path, *callbacks: Any, dropout: float = 0.1, **settings: Any) -> Trainer:
    """TRL's trainer with LoRA on a tiny decoder."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    tokens = numbers_tokenizer(60)
    return SFTTrainer(
        model=network,
        args=SFTConfig(str(folder), **(ARGUMENTS | settings)),
        train_dataset=rows(64, 0).remove_columns("labels"),
        eval_dataset=rows(16, 1).remove_columns("labels"),
        processing_class=tokens,
        callbacks=list(callbacks),
        peft_config=LoraConfig(
            r=2, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )


def numbers_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a number."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(number): number for number in range(3, size)}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
