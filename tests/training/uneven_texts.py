"""Training on targets of very different length, through the real loop, whatever the layout of the batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from models import tiny_bert, tiny_t5
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import swaft
from swaft.noise import TaskLoss
from swaft.training.config import TrainConfig
from swaft.training.run.step import Meter, Step, step_batches

STEPS, LEARNING_RATE = 6, 0.3
ROWS = 21
"""In an epoch of three steps of eight, the last of which the rows do not fill."""
MODELS = {"bert": tiny_bert, "t5": tiny_t5}


class Stretched(swaft.R3F):
    """R3F whose noise is a share of the embedding, and so the same wherever a row lies."""

    def _draw(self, embedding: Tensor, **_: Any) -> Tensor:
        return 1.5 * embedding


OBJECTIVES = {"plain": TaskLoss, "r3f": lambda: Stretched(weight=5.0)}


def texts(count: int) -> list[dict[str, Tensor]]:
    """Rows whose targets have 1 to 24 tokens, and which are of one of a few classes."""
    generator = torch.Generator().manual_seed(3)

    def tokens(low: int, high: int) -> Tensor:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(2, 20, (length,), generator=generator)

    return [
        {
            "input_ids": tokens(3, 9),
            "target": tokens(1, 24 if row % 3 else 2),
            "class": torch.randint(0, 2, (), generator=generator),
        }
        for row in range(count)
    ]


def collate(rows: list[dict[str, Tensor]], *, writes: bool) -> dict[str, Tensor]:
    """Pad a batch; its labels are the tokens of the target, or the class."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = (
        pad_sequence([row["target"] for row in rows], batch_first=True, padding_value=-100)
        if writes
        else torch.stack([row["class"] for row in rows])
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def loader_of(kind: str, *, batch_size: int) -> DataLoader[Any]:
    return DataLoader(
        texts(ROWS),  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=lambda rows: collate(rows, writes=kind == "t5"),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train_prepared(accelerator: Any, model: Any, optimizer: Any, loader: Any, objective: str) -> list[dict]:
    """Train what an accelerator has prepared, as the recipes do; returns what is logged after each step."""
    loss, logged = OBJECTIVES[objective](), []
    meter, train = Meter(accelerator), TrainConfig(output_dir="unused")
    run: Any = SimpleNamespace(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        meter=meter,
        config=SimpleNamespace(train=train, task="sequence classification"),
    )
    model.train()
    steps = step_batches(loader, accelerator.gradient_accumulation_steps)
    for number, (_, _, batches) in zip(range(1, STEPS + 1), steps, strict=False):
        step = Step(run, number, batches)
        for batch, share in step.micro_batches():
            out = loss(model, batch)
            step.log(**out.logged)
            step.backward(out.loss * share)
        step.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(meter.read() | {"grad_norm": step.measured_grad_norm()})
    return logged


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far two trained models are apart, as a share of their norm: largest over the tensors."""
    return max(
        float((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-2))
        for name, tensor in expected.items()
    )


def reference_file(folder: Path, kind: str, objective: str) -> Path:
    return folder / f"{kind}-{objective}.pt"
