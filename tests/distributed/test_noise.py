"""Noise objectives on two real ranks, under every engine, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[str, str]:
    """All checks, from one start of two ranks."""
    worker = Path(__file__).parent / "noise_worker.py"
    return start_ranks(worker, tmp_path_factory.mktemp("ranks") / "findings.json", timeout_s=240)


@pytest.mark.parametrize(
    ("case", "expected"),
    [("fp32", 8), ("fused", 15), ("bf16", 5), ("r4f", 4)],
    ids=["as one process", "fused", "bf16", "r4f"],
)
def test_two_passes_and_one_backward_hold_under_every_engine(case, expected, findings):
    checks = {name: fault for name, fault in findings.items() if name.startswith(f"{case}: ")}
    assert len(checks) == expected
    assert not any(checks.values()), "\n".join(f"{name}\n{fault}" for name, fault in checks.items() if fault)
