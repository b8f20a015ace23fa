"""A device to run a test on: the CPU, where its logic is tried, and a card, which it is for."""

from __future__ import annotations

import pytest
import torch

CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.unit), pytest.param("cuda", marks=CARD)])
def device(request) -> torch.device:
    """Each in turn; `-m gpu` and `-m "not gpu"` choose."""
    return torch.device(request.param)
