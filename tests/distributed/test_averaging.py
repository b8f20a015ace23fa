"""Weight averaging on two real ranks, under every engine and precision."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engines import ENGINES
from harness import run_ranks, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[str, str]:
    """All checks, from one start of two ranks."""
    return start_ranks(HERE / "averaging_worker.py", tmp_path_factory.mktemp("ranks") / "findings.json")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_promise_holds_under_this_engine(engine, findings):
    checks = {name: fault for name, fault in findings.items() if name.startswith(f"{engine}: ")}
    assert len(checks) == 10
    assert not any(checks.values()), "\n".join(f"{name}\n{fault}" for name, fault in checks.items() if fault)


@pytest.mark.parametrize(("case", "expected"), [("counting", 8), ("refused", 2)])
def test_steps_are_counted_and_doubtful_masters_refused(case, expected, findings):
    checks = {name: fault for name, fault in findings.items() if name.startswith(f"{case}: ")}
    assert len(checks) == expected
    assert not any(checks.values()), "\n".join(f"{name}\n{fault}" for name, fault in checks.items() if fault)


def test_an_error_on_one_rank_inside_a_swap_ends_the_run_instead_of_hanging_it():
    started = time.monotonic()
    returncode, output = run_ranks([HERE / "lonely_error_worker.py"], timeout_s=120)
    assert returncode != 0
    assert "evaluation broke on this rank alone" in output
    assert "the live weights are not restored" in output
    assert time.monotonic() - started < 90
