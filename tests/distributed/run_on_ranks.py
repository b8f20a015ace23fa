"""What the workers share: one training run, evaluation, collectives counted, folders and bits compared."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from engines import EngineCase, prepared
from models import MODELS, Batch, ModelCase
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.averaging.arithmetic import reference_mean
from swaft.errors import SwaftError

STEPS, TOTAL_STEPS = 6, 8
RULE = swaft.SWA(start=2, every=2)
MEMBERS = [2, 4, 6]
"""The steps among those that the rule takes in."""
COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter_tensor"),
    *("allgather_fn", "all_to_all", "barrier", "send", "recv", "isend", "irecv", "scatter"),
]


def train(
    case: EngineCase,
    model_case: ModelCase = MODELS["bert"],
    *,
    averaged: bool,
    swap_at: int | None = None,
    on_step=None,
    accumulation: int = 1,
):
    """Train a tiny model; (accelerator, model, optimizer, averager or None)."""
    accelerator, model, optimizer = prepared(case, accumulation=accumulation, model=model_case.build())
    averager = None
    if averaged:
        averager = swaft.WeightAverager(model, optimizer, rule=RULE, total_steps=TOTAL_STEPS)
    torch.manual_seed(7 + dist.get_rank())
    model.train()
    for step in range(STEPS * accumulation):
        with accelerator.accumulate(model):
            loss = model(**model_case.batch(step, dist.get_rank())).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if averager:
            averager.step()
        if on_step:
            on_step(step, model, optimizer)
        if averager and step == swap_at:
            state = torch.get_rng_state()
            with averager.swapped_in():
                logits(model, model_case.batch(0, 0))
            model.train()
            torch.set_rng_state(state)
    return accelerator, model, optimizer, averager


def logits(model: nn.Module, batch: Batch | None = None) -> Tensor:
    """Evaluation logits on a fixed batch."""
    model.eval()
    with torch.no_grad():
        return model(**(MODELS["bert"].batch(0, 0) if batch is None else batch)).logits.float()


def mean_in_one_process(members: list[Tensor]) -> Tensor:
    """The plain mean of equal tensors as the averaging arithmetic defines it, flat: the oracle of every layout."""
    return reference_mean(
        [member.reshape(-1) for member in members], [1 / (n + 1) for n in range(len(members))]
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The names of torch's and DeepSpeed's collectives that this rank calls inside, in order."""
    calls: list[str] = []
    inside = threading.local()

    def counting(name: str, original):
        def call(*args, **kwargs):
            if getattr(inside, "one", False):  # DeepSpeed's are made of torch's
                return original(*args, **kwargs)
            calls.append(name)
            inside.one = True
            try:
                return original(*args, **kwargs)
            finally:
                inside.one = False

        return call

    with contextlib.ExitStack() as patched:
        for library in filter(None, (dist, sys.modules.get("deepspeed.comm"))):
            for name in COLLECTIVES:
                if hasattr(library, name):
                    count = counting(name, getattr(library, name))
                    patched.enter_context(mock.patch.object(library, name, count))
        yield calls


def raised_on_every_rank(error: type[SwaftError], part: str, action) -> None:
    """Assert that an action raises an error of exactly this type, with these words, on every rank."""
    try:
        action()
        found = "nothing was raised"
    except SwaftError as raised:
        found = "" if type(raised) is error and part in str(raised) else repr(raised)
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert not any(everywhere), everywhere


class shared_folder:
    """A temporary folder that all ranks agree on."""

    def __enter__(self) -> Path:
        message = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(message, src=0)
        return Path(message[0])

    def __exit__(self, *_: object) -> None:
        dist.barrier()


def load_plainly(folder: Path):
    """The folder as a script without DeepSpeed opens it: transformers must forget that stage 3 is on."""
    unset_hf_deepspeed_config()
    return AutoModelForSequenceClassification.from_pretrained(folder)
