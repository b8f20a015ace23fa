"""One rank of the measurements of `benchmarks.plan_accuracy`: trains each model for a few steps, writes its memory.

accelerate launch ... benchmarks/plan_accuracy_worker.py FOLDER MODEL ...
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a script

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import swaft
from benchmarks.measuring import forget_peak, memory_of
from benchmarks.plan_accuracy_cases import MODELS, WARM_UP, Model
from swaft.training.config import NoiseConfig, TrackConfig
from swaft.training.launch.accelerator import build_accelerator, resolve_engine, whole_model_loading
from swaft.training.launch.fsdp2 import prepare
from swaft.training.models.build import build_objective, build_optimizer
from swaft.training.models.pretrained import hidden_size, with_checkpointing

STEPS = 3
"""Two in which ZeRO-3 learns the order of the modules, and one in which it knows it."""


def main() -> None:
    """Measure the models of these names, one after another."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    train_steps(WARM_UP)  # libraries, the process group, threads and compiled code are not part of a plan
    found = {}
    for name in names:
        settle()
        before = memory_of("VmRSS")
        forget_peak()
        train_steps(MODELS.get(name, WARM_UP))
        found[name] = memory_of("VmHWM") - before
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def train_steps(case: Model) -> None:
    """Train a model as the recipes do, and average its weights from the second step on."""
    AcceleratorState._reset_state()
    train = case.train()
    settings: Any = SimpleNamespace(train=train, track=TrackConfig())
    engine = resolve_engine(train, os.environ, hidden_size=hidden_size(case.configuration()))
    accelerator = build_accelerator(settings, engine)
    with whole_model_loading(accelerator):
        model = with_checkpointing(case.build(), train.gradient_checkpointing)
    objective = build_objective(NoiseConfig(), seed=0)
    batches = [case.batch() for _ in range(STEPS * accelerator.num_processes)]
    rows: Any = [
        {name: column[i] for name, column in batch.items()} for batch in batches for i in range(case.rows)
    ]
    model, optimizer, loader = prepare(
        accelerator, model, partial(build_optimizer, train=train), DataLoader(rows, batch_size=case.rows)
    )
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=STEPS)
    model.train()
    for batch in loader:
        out = objective(model, batch)
        accelerator.backward(out.loss)
        if not accelerator.state.deepspeed_plugin:  # DeepSpeed does its own clipping
            accelerator.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
    averager.wait()
    averager.close()
    accelerator.wait_for_everyone()


def settle() -> None:
    """Release what the previous model left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
