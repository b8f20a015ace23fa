"""EMA and R3F in Seq2SeqTrainer: two added lines."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

import swaft


def rows(number: int) -> Dataset:
    """Made-up texts of six tokens, to be repeated in reverse."""
    texts = torch.randint(2, 60, (number, 6))
    return Dataset.from_dict({"input_ids": texts.tolist(), "labels": texts.flip(1).tolist()})


def main(folder: Path) -> None:
    """Train and write final-averaged/."""
    set_seed(0)
    trainer = Seq2SeqTrainer(
        model=T5ForConditionalGeneration(
            T5Config(
                vocab_size=60,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        args=Seq2SeqTrainingArguments(
            str(folder),
            max_steps=40,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            report_to="none",
        ),
        train_dataset=rows(160),
        eval_dataset=rows(40),
        callbacks=[
            swaft.WeightAveragingCallback(swaft.EMA(half_life=0.1)),
            swaft.NoiseCallback(swaft.R3F(preset="relative")),  # the fused loss: no logits are kept
        ],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
