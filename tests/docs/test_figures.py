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


def test_the_readme_quotes_the_evidence_as_it_stands():
    readme, evidence = ((ROOT / name).read_text() for name in ("README.md", "docs/evidence.md"))
    row = next(
        line for line in evidence.splitlines() if line.startswith("| `constant:swa-0.5` | `decayed:last` |")
    )
    loss, score = (row.replace("*", "").split(" | ")[i] for i in (2, 4))
    fewer, low, high, more, worst, best = re.findall(
        r"has ([\d.]+) % less test loss.*?interval ([\d.]+) to ([\d.]+) %\), and ([\d.]+) points.*?"
        r"\((-?[\d.]+) to (-?[\d.]+)\)",
        readme,
        re.DOTALL,
    )[0]
    numbers = [*re.findall(r"-?[\d.]+", loss), *re.findall(r"-?[\d.]+", score)]
    assert [-float(fewer), -float(high), -float(low)] == pytest.approx([*map(float, numbers[:3])], abs=0.05)
    assert [float(more), float(worst), float(best)] == pytest.approx([*map(float, numbers[3:])], abs=0.005)
