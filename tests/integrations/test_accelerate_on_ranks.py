from __future__ import annotations

from pathlib import Path

import pytest
from harness import faults, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_accelerates_own_checkpoints_carry_the_averages_on_two_ranks(tmp_path):
    worker = Path(__file__).parent / "accelerate_worker.py"
    findings = start_ranks(worker, tmp_path / "findings.json", timeout_s=280)
    for engine in ("ddp fp32", "zero2 bf16", "zero3 fp32", "fsdp2 fp32, by accelerate"):
        assert not faults(findings, engine, checks=2)
