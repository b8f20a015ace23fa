"""The whole matrix: every engine with every model on one, two, three and four real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import ENGINES
from harness import faults, start_ranks
from models import MODELS

LIMIT_S = 1500
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_promise_holds_under_every_engine(ranks, model, tmp_path):
    cases = [f"{engine} / {model}" for engine in ENGINES]
    worker = Path(__file__).parent / "averaging_worker.py"
    findings = start_ranks(worker, tmp_path / "findings.json", ranks=ranks, cases=cases, timeout_s=LIMIT_S)
    assert not "".join(faults(findings, case, checks=12) for case in cases)
