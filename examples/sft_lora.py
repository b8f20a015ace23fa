"""EMA and R3F in TRL's SFTTrainer with LoRA; final-averaged/ is an adapter folder."""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import swaft

WORDS = ["<pad>", "<s>", "</s>", "Q", "A", *map(str, range(40))]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def main(folder: Path) -> None:
    """Train adapters to add small numbers, and write their average."""
    set_seed(0)
    rows = [{"prompt": f"Q {a} {b}", "completion": f" A {a + b}"} for a in range(12) for b in range(12)]
    trainer = SFTTrainer(
        model=LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        ),
        args=SFTConfig(
            str(folder), max_steps=40, lr_scheduler_type="constant", learning_rate=1e-3, bf16=False,
            logging_steps=10, report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[
            swaft.WeightAveragingCallback(swaft.EMA(half_life=0.1)),
            swaft.NoiseCallback(swaft.R3F(preset="relative")),
        ],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
