"""A classifier small enough to follow by hand, with rows for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader

WIDTH = 3
CLASSES = 2


class Classifier(nn.Module):
    """Mean of token embeddings, then a linear head; called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.dropout(self.embedding(input_ids).mean(dim=1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def make_classifier(*, dropout: bool = False) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    model.dropout.p = 0.5 if dropout else 0.0
    return model


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 11, (5,), generator=generator),
            "attention_mask": torch.ones(5, dtype=torch.int64),
            "labels": torch.randint(0, CLASSES, (), generator=generator),
            "idx": torch.tensor(row),
        }
        for row in range(count)
    ]


def make_loader(rows, batch_size: int, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(
        rows, batch_size=batch_size, shuffle=shuffle, generator=torch.Generator().manual_seed(2)
    )
