"""R3F in your own loop: the loss of a step is the mean over its rows, however many micro-batches it has."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, set_seed

import swaft

EPOCHS, ACCUMULATION = 4, 2


def rows() -> list[dict[str, torch.Tensor]]:
    """Made-up texts of six tokens; the first token gives the class."""
    texts = torch.randint(1, 60, (160, 6))
    return [{"input_ids": text, "labels": text[0] % 3} for text in texts]


def main(folder: Path) -> None:
    """Train with the noise objective, log what it does, save the model."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    )
    objective = swaft.R3F(preset="relative")
    objective.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=8))
    accelerator.register_for_checkpointing(objective)  # carries the step that its noise depends on

    model.train()  # from_pretrained returns a model in evaluation mode
    for _ in range(EPOCHS):
        batches = iter(loader)
        while step := list(islice(batches, ACCUMULATION)):
            counted = sum((batch["labels"] != -100).sum() for batch in step)
            total = accelerator.reduce(counted)  # rows of this step on all ranks
            means = ACCUMULATION * accelerator.num_processes  # what accelerate and the engine divide by
            for batch in step:
                # Not accelerator.accumulate: the loader is read ahead, so any batch may look like its last one.
                accelerator.sync_gradients = batch is step[-1]
                with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
                    out = objective(model, batch)
                    accelerator.backward(out.loss * (out.num_items * means / total))
                    optimizer.step()
                    optimizer.zero_grad()
        accelerator.print(
            f"task loss {out.task_loss:.3f}, divergence {out.divergence:.2e}, noise {out.noise_to_signal:.2f}"
        )
    accelerator.unwrap_model(model).save_pretrained(folder / "final")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
