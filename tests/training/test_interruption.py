"""Runs that are asked to end."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from swaft.errors import StateError
from swaft.training.launch.interruption import (
    SIGNALS,
    Interrupted,
    InterruptibleLoader,
    Interruption,
    leave_signals_to_the_rank,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_told_at_the_next_check(number):
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted):
            interruption.check()


def test_signals_belong_to_whoever_had_them_before():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_evaluation_ends_between_two_batches():
    with Interruption() as interruption:
        batches = iter(InterruptibleLoader([1, 2, 3], interruption))
        assert next(batches) == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted):
            next(batches)


def test_a_failure_goes_before_the_wish_to_end():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StateError, match="disk"):
            interruption.check(StateError("the disk is full"))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher sends it, to every process of a rank
        return row


def test_processes_that_load_batches_outlive_the_signals():
    loader = DataLoader(Rows(), num_workers=1, worker_init_fn=leave_signals_to_the_rank)
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]
