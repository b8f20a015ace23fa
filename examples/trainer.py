"""EMA in transformers' Trainer: one added line. Both weights are evaluated; the averaged score picks the best."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import swaft


def rows(number: int) -> Dataset:
    """Made-up texts of six tokens; the first token gives the class."""
    texts = torch.randint(1, 60, (number, 6))
    return Dataset.from_dict({"input_ids": texts.tolist(), "labels": (texts[:, 0] % 3).tolist()})


def main(folder: Path) -> None:
    """Train, and evaluate the averaged weights once more by hand."""
    set_seed(0)
    trainer = Trainer(
        model=BertForSequenceClassification(
            BertConfig(
                vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
            )
        ),
        args=TrainingArguments(
            str(folder),
            max_steps=40,
            lr_scheduler_type="constant_with_warmup",  # a decayed rate leaves averaging little to do
            warmup_steps=4,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            load_best_model_at_end=True,
            metric_for_best_model="averaged_loss",
            greater_is_better=False,
            report_to="none",
        ),
        train_dataset=rows(160),
        eval_dataset=rows(40),
        callbacks=[swaft.WeightAveragingCallback(swaft.EMA(half_life=0.1))],  # the added line
    )
    trainer.train()  # writes final-averaged/ to the folder
    with swaft.averaged_weights(trainer):
        print(trainer.evaluate())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
