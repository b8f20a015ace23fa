"""EMA in a plain accelerate loop: three lines for averaging, one for checkpoints that carry the averages."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, set_seed

import swaft

STEPS = 40


def rows() -> list[dict[str, torch.Tensor]]:
    """Made-up texts of six tokens; the first token gives the class."""
    texts = torch.randint(1, 60, (160, 6))
    return [{"input_ids": text, "labels": text[0] % 3} for text in texts]


def main(folder: Path) -> None:
    """Train, evaluate the last and the averaged weights, save the averaged model."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=8))

    averager = swaft.WeightAverager(model, optimizer, rule=swaft.EMA(half_life=0.1), total_steps=STEPS)
    swaft.register_averager(accelerator, averager)  # save_state and load_state now carry the averages

    model.train()  # from_pretrained returns a model in evaluation mode
    while averager.applied_steps < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            averager.step()  # on every micro-batch: it counts only real steps
            if averager.applied_steps == STEPS:
                break
    accelerator.save_state(str(folder / "checkpoint"))

    batch = next(iter(loader))
    last = accuracy(model, batch)
    with averager.swapped_in():  # on every rank
        averaged = accuracy(model, batch)
    accelerator.print(f"accuracy of the last weights {last:.3f}, of the averaged ones {averaged:.3f}")
    averager.save_pretrained(folder / "final-averaged")  # a Hugging Face folder


@torch.no_grad()
def accuracy(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Share of rows classified correctly."""
    model.eval()
    return float((model(**batch).logits.argmax(-1) == batch["labels"]).float().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
