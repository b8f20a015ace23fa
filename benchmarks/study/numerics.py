"""Identifies the arithmetic: a hash of the weights after a fixed tiny training, and machine and versions."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from benchmarks.environment import version_of
from benchmarks.study.loop import train
from benchmarks.study.model import attention_on
from benchmarks.study.pack import model_name, packed
from benchmarks.study.readouts import rules_for
from benchmarks.study.rivals import TEACHER
from benchmarks.study.trainings import TRAININGS

PACKAGES = ("torch", "transformers", "numpy", "numba")
STEPS, BATCH, LENGTH, CLASSES = 24, 4, 8, 3
PRECISION = os.environ.get("SWAFT_STUDY_PRECISION", "bf16")
"""Of the passes: bf16 or fp32, whichever is faster on the machine. Weights and optimizer are fp32."""
if PRECISION not in ("bf16", "fp32"):
    raise SystemExit(f"SWAFT_STUDY_PRECISION is {PRECISION!r}; expected bf16 or fp32")


@cache
def fingerprint(training: str, device: str, precision: str) -> str:
    """Hash of the weights and averages after ``STEPS`` steps of a training of a random encoder on random rows.

    It changes with anything that changes what a training computes (the library, torch, the processor), and with
    nothing else.

    Args:
        training: name of the training.
        device: ``cpu`` or ``cuda``.
        precision: of the passes.
    """
    from transformers import BertConfig, BertForSequenceClassification

    kind = TRAININGS[training]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=CLASSES, attn_implementation=attention_on(device),
    )  # fmt: skip
    model = BertForSequenceClassification(config).to(device)
    batches: list[dict[str, torch.Tensor]] = [
        {
            "input_ids": torch.randint(1, 50, (BATCH, LENGTH)),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "labels": torch.randint(CLASSES, (BATCH,)),
        }
        for _ in range(STEPS)
    ]
    if kind.teachers:
        batches = [batch | {TEACHER: torch.randn(BATCH, CLASSES)} for batch in batches]
    trained = train(
        model, batches, objective=kind.objective(0), schedule=kind.schedule, rate=1e-3, total_steps=STEPS,
        rules=rules_for(kind, STEPS), precision=precision, seed=0,
    )  # fmt: skip
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    for name in trained.averager.rules:
        found.update(trained.averager.shard(name).numpy().tobytes())
    trained.averager.close()
    return found.hexdigest()[:12]


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of machine a row comes from, with its precision and the model of a pack: only rows of one kind are
    paired.
    """
    found = row["machine"]
    parts = ("card", "processor", "torch", "precision", "model")
    return ", ".join(str(found[part]) for part in parts if found.get(part))


def machine() -> dict[str, Any]:
    """Processor, GPU, threads and versions; with a pack also its model."""
    return {
        "processor": _processor(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision": PRECISION,
        **({"model": model_name()} if packed() else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def _processor() -> str:
    """The processor, and whether it multiplies bf16 natively, because results depend on it."""
    try:
        with open("/proc/cpuinfo") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    known = {name.strip(): value.strip() for name, value in fields.items()}
    flags = known.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([known.get("model name", os.uname().machine), *units])
