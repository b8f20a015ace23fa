from __future__ import annotations

from pathlib import Path

import pytest
from harness import faults, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]


def test_weights_that_fsdp2_has_cut_generate_as_whole_ones_though_ranks_end_apart(tmp_path):
    worker = Path(__file__).parent / "generation_worker.py"
    findings = start_ranks(worker, tmp_path / "findings.json", timeout_s=180)
    assert not faults(findings, "fsdp2", checks=3)
