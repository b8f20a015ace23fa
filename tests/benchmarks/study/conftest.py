"""A tiny task, a tiny encoder and a budget of a few steps, so that a cell takes a second."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.study import fitting, tasks
from benchmarks.study import model as encoder

WORDS = ("good fine great nice", "bad poor awful sad")


@pytest.fixture
def tiny_task(tmp_path, monkeypatch):
    """The task `cr` with 20 rows a split, a random encoder in MiniLM's place, and a budget of 12 steps."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    generator = np.random.default_rng(0)
    (tmp_path / "cr").mkdir()
    for split in ("train", "validation", "test"):
        labels = generator.integers(2, size=20)
        texts = [" ".join(generator.choice(WORDS[label].split(), size=3)) for label in labels]
        parquet.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "cr" / f"{split}.parquet")
    monkeypatch.setenv("SWAFT_DATA", str(tmp_path))
    monkeypatch.setenv("SWAFT_STUDY", str(tmp_path / "results"))
    monkeypatch.setitem(fitting.REGIMES, "main", fitting.Regime(rows=16, epochs=3, batch=4))
    monkeypatch.setattr(encoder, "pretrained", _tiny_encoder)
    tasks.read.cache_clear()
    yield tmp_path
    tasks.read.cache_clear()


def _tiny_encoder(num_labels, seed, device):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).to(device)
