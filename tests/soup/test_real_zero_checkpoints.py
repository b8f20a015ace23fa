from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_ranks

pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_what_is_read_of_deepspeeds_checkpoints_is_what_swaft_exports(tmp_path):
    code, output = run_ranks([Path(__file__).with_name("zero_checkpoints_worker.py"), tmp_path])
    assert code == 0, output[-6000:]
    assert output.count(": equal") == 4
