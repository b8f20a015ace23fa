"""Runs on every rank: averages saved under one engine by some number of ranks, opened under another by others.

    torchrun ... state_worker.py FINDINGS "save / ENGINE" ... or "load / ENGINE" ...

Where the states lie says the variable SWAFT_TEST_STATES. Beside each, FOLDER.safetensors holds the whole averages
as the run had them that saved it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from engines import ENGINES, EngineCase, prepared
from harness import worker_main
from models import MODELS, ModelCase
from run_on_ranks import same_bits
from safetensors.torch import load_file, save_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.averaging.shards import gather_trained

STATES = Path(os.environ["SWAFT_TEST_STATES"])
RULES = {"swa": swaft.SWA(start=1), "lawa": swaft.LAWA(start=0, last=2), "ema": swaft.EMA(start=0, decay=0.7)}
STEPS, TOTAL_STEPS = 4, 8
MODEL = MODELS[os.environ.get("SWAFT_TEST_MODEL", "uneven")]


def start(case: EngineCase, model_case: ModelCase):
    accelerator, model, optimizer = prepared(case, model=model_case.build())
    averager = swaft.WeightAverager(model, optimizer, rule=RULES, total_steps=TOTAL_STEPS)
    return accelerator, model, optimizer, averager


def advance(accelerator, model, optimizer, averager, first: int, last: int) -> None:
    model.train()
    for step in range(first, last):
        loss = model(**MODEL.batch(step, dist.get_rank())).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        averager.step()


def whole(averager) -> dict[str, torch.Tensor]:
    """Every vector of every rule whole, by name, on rank 0: means and compensations."""
    found = {}
    for name in averager.rules:
        averager.wait()
        for index, lane in averager._averages.lanes[name].held().items():
            parts = {"mean": lane.mean}
            if lane.compensation is not None:
                parts["compensation"] = lane.compensation.float()
            for part, vector in parts.items():
                gathered = gather_trained(averager.engine, vector)
                found |= {f"{name}/{index}/{part}/{key}": value.clone() for key, value in gathered.items()}
    return found


def save_case(name: str, case: EngineCase):
    accelerator, model, optimizer, averager = start(case, MODEL)
    advance(accelerator, model, optimizer, averager, 0, STEPS)
    folder = STATES / f"{name.replace(' ', '_').replace(',', '')}-{dist.get_world_size()}"

    def it_is_written_whole():
        averager.save_state(folder)
        assert (folder / "COMPLETE").exists()
        assert len(list(folder.glob("rank-*.safetensors"))) == dist.get_world_size()
        vectors = whole(averager)
        if dist.get_rank() == 0:
            save_file(vectors, folder.with_suffix(".safetensors"))

    def it_replaces_an_older_one():
        averager.save_state(folder, overwrite=True)
        assert sorted(path.name for path in STATES.iterdir() if path.name.startswith(".")) == []

    yield "it is written whole", it_is_written_whole
    yield "it replaces an older one", it_replaces_an_older_one
    averager.close()
    unset_hf_deepspeed_config()


def load_case(name: str, case: EngineCase):
    for folder in sorted(path for path in STATES.iterdir() if path.is_dir()):
        accelerator, model, optimizer, averager = start(case, MODEL)

        def it_opens_bit_for_bit(folder=folder, averager=averager):
            averager.load_state(folder, same_weights=False)
            assert averager.applied_steps == STEPS
            found = whole(averager)
            if dist.get_rank() == 0:
                expected = load_file(folder.with_suffix(".safetensors"))
                assert found.keys() == expected.keys()
                assert all(same_bits(found[key], expected[key]) for key in expected)

        def it_goes_on(parts=(accelerator, model, optimizer, averager), averager=averager):
            advance(*parts, STEPS, TOTAL_STEPS)
            assert [averager.count(rule) for rule in RULES] == [8, 9, 9]
            averager.shard("swa")

        yield f"{folder.name} opens bit for bit", it_opens_bit_for_bit
        yield f"{folder.name} goes on", it_goes_on
        averager.close()
        unset_hf_deepspeed_config()


if __name__ == "__main__":
    worker_main(
        {
            f"save / {name}": lambda name=name, case=case: save_case(name, case)
            for name, case in ENGINES.items()
        }
        | {
            f"load / {name}": lambda name=name, case=case: load_case(name, case)
            for name, case in ENGINES.items()
        }
    )
