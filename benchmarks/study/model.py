"""The encoder with a new head, its logits, and its weights rounded to few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study.pack import model_folder
from benchmarks.study.rows import Rows, evaluation_batches

GROUP = 64
"""Weights of a row that share a scale and an offset in int4."""


def pretrained(num_labels: int, seed: int, device: torch.device) -> nn.Module:
    """The embedded MiniLM with a classification head initialised from the seed."""
    from transformers import AutoModelForSequenceClassification

    return from_pack(AutoModelForSequenceClassification, seed, device, num_labels=num_labels)


def from_pack(kind: Any, seed: int, device: torch.device, **options: Any) -> nn.Module:
    """The encoder as one of transformers' ``Auto`` classes builds it, in fp32; new weights come from the seed."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    attention = attention_on(device.type)
    model = kind.from_pretrained(
        model_folder(), dtype=torch.float32, attn_implementation=attention, **options
    )
    return model.to(device)


def attention_on(device: str) -> str:
    """Attention implementation: eager on a GPU, because only its backward pass gives the same bits every time."""
    return "eager" if device == "cuda" else "sdpa"


def logits_of(model: nn.Module, rows: Rows) -> Tensor:
    """Logits (N, C) of every row, fp32, on the host, without dropout."""
    return each_row(model, rows, lambda batch: model(**batch).logits.float())


def each_row(model: nn.Module, rows: Rows, compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """What is computed from the model's inputs, for every row (N, ...), on the host, without dropout."""
    parts, order = [], []
    with evaluating(model) as device:
        for places in evaluation_batches(rows):
            batch = {name: tensor.to(device) for name, tensor in rows.take(places).inputs().items()}
            parts.append(compute(batch).cpu())
            order += places.tolist()
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Switch off dropout and gradients for a while; yields the model's device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


@contextmanager
def changed(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Change the parameters for a while; afterwards they have the same bits as before."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, kept[name]))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def to_bf16(_: str, weight: Tensor) -> Tensor:
    """Every weight to bf16, ties to even."""
    return weight.bfloat16().float()


def to_int8(_: str, weight: Tensor) -> Tensor:
    """Matrices (out, in) to 255 levels, symmetric, one scale per output channel; vectors are unchanged."""
    if weight.dim() < 2:
        return weight
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round() * scale


def to_int4(_: str, weight: Tensor) -> Tensor:
    """Matrices (out, in) to 16 levels from min to max of each ``GROUP`` weights in a row; vectors are unchanged."""
    if weight.dim() < 2:
        return weight
    short = -weight.shape[-1] % GROUP
    padded = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], short)], -1)
    groups = padded.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-12) / 15
    return (((groups - low) / scale).round() * scale + low).flatten(-2)[..., : weight.shape[-1]]


ROUNDINGS = {"bf16": to_bf16, "int8": to_int8, "int4": to_int4}
