"""Figures that pages quote are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_pages_quote_the_largest_error_of_a_plan_that_was_measured():
    found = json.loads((ROOT / "benchmarks/results/plan_accuracy.json").read_text())
    largest = 100 * found["accuracy"]["largest error"]
    plan, readme = ((ROOT / name).read_text() for name in ("docs/plan.md", "README.md"))
    (exact,) = re.findall(r"the largest error is ([\d.]+) %", plan)
    (bound,) = re.findall(r"within (\d+) % of the memory", readme)
    assert float(exact) == pytest.approx(largest, abs=0.05)
    assert largest <= float(bound) < largest + 1
