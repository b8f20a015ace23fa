"""A rank of some that sum numbers until one of them is gone; prints which those that are left say is.

python tests/training/roll_call_worker.py RANK RANKS LOST
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from swaft.training.launch.failure import roll_call

rank, ranks, lost = map(int, sys.argv[1:4])
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
others = dist.new_group(backend="gloo")
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
try:
    for step in range(10_000):
        if rank == lost and step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1000), group=others if step % 2 else None)
except RuntimeError:
    print(roll_call(2.0), flush=True)
os._exit(0)
