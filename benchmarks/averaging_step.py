"""What one averaging event costs beside the training step it follows, side by side in one run.

    python -m benchmarks.averaging_step

Steps with and without an event alternate in random order on one model, so both see the same machine. Also measured:
torch's own `AveragedModel` on the same weights. On a CPU only the ratios count. Writes benchmarks/results/.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import BertConfig, BertForSequenceClassification

import swaft
from benchmarks.environment import environment

ROUNDS, WARM_UP = 15, 3
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, write the JSON, print it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size, length = (64, 128) if device == "cuda" else (8, 64)
    torch.manual_seed(0)
    random.seed(0)
    model = BertForSequenceClassification(
        BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12)
    )
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=10_000)
    torchs = AveragedModel(copy.deepcopy(model), device="cpu")
    batch = {
        "input_ids": torch.randint(0, 30_000, (batch_size, length), device=device),
        "labels": torch.randint(0, 2, (batch_size,), device=device),
    }

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    arms = {
        "training step": step,
        "swaft event": lambda: averager._take_in(),
        "torch AveragedModel event": lambda: torchs.update_parameters(model),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(WARM_UP + ROUNDS):
        for name in random.sample(list(arms), len(arms)):
            seconds = timed(arms[name], device)
            if round_number >= WARM_UP:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": [batch_size, length],
        "seconds": times,
        "event / training step": {
            name: medians[name] / medians["training step"] for name in arms if name != "training step"
        },
    }
    name = "averaging_step" + (
        "" if device == "cpu" else "_" + torch.cuda.get_device_name().replace(" ", "_")
    )
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"seconds, median": medians, **result["event / training step"]}, indent=1))


def timed(call, device: str) -> float:
    """Seconds of one call, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
