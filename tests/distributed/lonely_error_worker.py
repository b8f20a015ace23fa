"""Runs on every rank: one rank fails inside a swap while the other waits for it in a collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from engines import ENGINES, prepared
from models import batch

import swaft
import swaft.distributed

swaft.distributed.ARRIVAL_TIMEOUT_S = 3.0

dist.init_process_group("gloo")
accelerator, model, optimizer = prepared(ENGINES["ddp fp32"])
averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=4)
accelerator.backward(model(**batch(0, dist.get_rank())).loss)
optimizer.step()
averager.step()
with averager.swapped_in():
    if dist.get_rank() == 1:
        raise RuntimeError("evaluation broke on this rank alone")
    dist.all_reduce(torch.ones(1))
