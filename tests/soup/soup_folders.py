"""Small checkpoints to average."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

CONFIG = {
    "architectures": ["Net"],
    "model_type": "net",
    "torch_dtype": "float16",
    "text_config": {"dtype": "float16"},
}


def folder_of(path: Path, tensors: dict[str, Tensor], *, shards: int = 1, config: dict | None = None) -> Path:
    """Write a Hugging Face folder, whole or in shards."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (path / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[number::shards]}
        save_file(held, path / file)
        weight_map |= dict.fromkeys(held, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(50, 8).to(dtype),
        "layer.weight": torch.randn(8, 8).to(dtype),
        "layer.bias": torch.randn(8).to(dtype),
        "scale": torch.randn(()).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "position_ids": torch.arange(50),
        "mask": torch.tensor([True, False]),
    }


def folders(path: Path, count: int, **keywords) -> list[Path]:
    return [folder_of(path / f"in{seed}", random_tensors(seed), **keywords) for seed in range(count)]


def loaded(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[n].dtype, found[n].shape, bits(found[n])) == (t.dtype, t.shape, bits(t))
        for n, t in expected.items()
    )


def golden(sources: list[dict[str, Tensor]], weights: list[float] | None = None) -> dict[str, Tensor]:
    """The mean in float64, rounded once to fp32."""
    shares = weights or [1.0] * len(sources)
    means = {}
    for name, first in sources[0].items():
        if first.is_floating_point():
            total = sum(w * source[name].double() for w, source in zip(shares, sources, strict=True))
            means[name] = (total / sum(shares)).float()
        else:
            means[name] = first
    return means


class Attack:
    """Pickled, it fails the test that opens it."""

    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return BertForSequenceClassification(config)
