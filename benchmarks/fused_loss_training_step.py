"""A whole training step of a sequence-to-sequence model under R3F, against a plain step of the same batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import swaft
from benchmarks.fused_loss_clock import interleaved, ratios
from benchmarks.fused_loss_rivals import loss_of_logits
from benchmarks.measuring import spread

PLAIN_STEP, TWO_SIDED, ONE_SIDED, WHOLE_LOGITS = (
    "plain step",
    "R3F, both sides",
    "R3F, noised side held constant",
    "R3F on whole logits",
)
BARS = {TWO_SIDED: 2.05, ONE_SIDED: 1.45}
"""Bounds, as multiples of a plain step, on a GPU."""
T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
CPU_T5 = {"vocab_size": 32128, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
TINY_T5 = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BATCHES = {"cuda": (64, 128, 128), "cpu": (8, 32, 32)}
"""Sentences, and source and target tokens of each."""
SIGMA = 1e-5
LEARNING_RATE = 1e-5


def measure(*, quick: bool, device: str) -> dict[str, object]:
    """Steps of all arms on one model and optimizer, in turn."""
    sizes = TINY_T5 if quick else T5_SMALL if device == "cuda" else CPU_T5
    sentences, source, target = (2, 5, 4) if quick else BATCHES[device]
    torch.manual_seed(0)
    config = T5Config(**sizes, decoder_start_token_id=0)
    model: Any = T5ForConditionalGeneration(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device == "cuda")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(2, config.vocab_size, (sentences, source), generator=generator).to(device),
        "attention_mask": torch.ones(sentences, source, dtype=torch.int64, device=device),
        "labels": torch.randint(2, config.vocab_size, (sentences, target), generator=generator).to(device),
    }
    losses: dict[str, Callable[[], Tensor]] = {
        PLAIN_STEP: lambda: model(**batch).loss,
        TWO_SIDED: _objective(model, batch, swaft.R3F(sigma=SIGMA)),
        ONE_SIDED: _objective(model, batch, swaft.R3F(sigma=SIGMA, detach="noised")),
        WHOLE_LOGITS: lambda: _on_whole_logits(model, batch),
    }

    def step(loss_of: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    timings = interleaved(
        {name: lambda loss_of=loss_of: step(loss_of) for name, loss_of in losses.items()},
        warm_up=3 if device == "cuda" else 1,
        rounds=2 if quick else 21 if device == "cuda" else 9,
        allowance_s=20.0,
        keep=lambda loss: loss.item(),
    )
    return {
        "model": sizes,
        "sentences, source and target tokens": (sentences, source, target),
        "precision": "fp32 weights, bf16 autocast" if device == "cuda" else "fp32",
        "threads": torch.get_num_threads(),
        "bars for this / plain step": BARS if device == "cuda" else {},
        "arms": {name: {"skipped": reason} for name, reason in timings.skipped.items()}
        | {
            name: {
                "seconds": spread(values),
                "this / plain step": ratios(values, timings.seconds[PLAIN_STEP]),
                "loss": timings.results[name],
            }
            for name, values in timings.seconds.items()
        },
    }


def rows(result: dict) -> list[Sequence[object]]:
    """The printed table."""
    lines: list[Sequence[object]] = []
    for name, arm in result["arms"].items():
        if "skipped" in arm:
            lines.append((name, f"skipped: {arm['skipped']}"))
            continue
        bar = result["bars for this / plain step"].get(name)
        lines.append(
            (
                name,
                f"{1e3 * arm['seconds']['median']:.2f} ms",
                f"{arm['this / plain step']['median']:.3f} plain steps",
                f"bar {bar}" if bar else "",
            )
        )
    return lines


def _objective(model: Any, batch: dict[str, Tensor], objective: Any) -> Callable[[], Tensor]:
    objective.prepare_model(model)
    return lambda: objective(model, batch).loss


def _on_whole_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """R3F as it is commonly written: the noise on the embeddings, the loss on both passes' whole logits."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    noise = torch.empty_like(embeddings).uniform_(-SIGMA, SIGMA)
    others = {key: value for key, value in batch.items() if key != "input_ids"}
    clean = model(**others, inputs_embeds=embeddings).logits
    noised = model(**others, inputs_embeds=embeddings + noise).logits
    return loss_of_logits(clean.flatten(0, -2), noised.flatten(0, -2), batch["labels"].flatten())
