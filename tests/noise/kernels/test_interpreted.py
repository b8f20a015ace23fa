"""The Triton kernels, run by Triton's interpreter on a CPU and held to float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_checks
import pytest

import swaft

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

REPOSITORY = str(Path(swaft.__file__).parents[1])
TIMEOUT = 240


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What went wrong in each check, None where nothing did."""
    finished = subprocess.run(
        [sys.executable, kernel_checks.__file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    return {line["check"]: line["failure"] for line in lines}


@pytest.mark.timeout(TIMEOUT + 20)
@pytest.mark.parametrize("name", kernel_checks.CHECKS)
def test_an_interpreted_kernel_is_right(name, outcomes):
    assert outcomes[name] is None, outcomes[name]
