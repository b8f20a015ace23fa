from __future__ import annotations

from pathlib import Path

import pytest
from harness import faults, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
WORKER = Path(__file__).parent / "trainer_worker.py"
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return start_ranks(WORKER, tmp_path_factory.mktemp("trainer") / "findings.json", timeout_s=380)


@pytest.mark.parametrize("engine", [*ENGINES, "sft zero2"])
def test_a_trainer_averages_evaluates_resumes_and_trains_noise_on_two_ranks(findings, engine):
    assert not faults(findings, engine, checks=5)
