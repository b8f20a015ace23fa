"""Which ranks are told to be gone, by those that are left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from swaft.training.launch.failure import roll_call

WORKER = Path(__file__).with_name("roll_call_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("lost", [0, 2])
def test_of_ranks_that_wait_for_each_other_all_that_are_left_name_the_one_that_is_gone(lost):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "4", str(lost)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(4)
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    left = [said[rank] for rank in range(4) if rank != lost]
    assert left == [f"of 4 ranks these said nothing for 2 s: {lost}"] * 3


@pytest.mark.unit
def test_a_meeting_place_that_takes_a_call_and_never_answers_is_not_waited_for(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "1"}
        for name, value in meeting.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        assert roll_call(0.5) == f"127.0.0.1:{port}, where the ranks met, does not answer"
        assert time.monotonic() - began < 5
