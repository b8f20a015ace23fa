from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from launching import forget_accelerate

pytestmark = pytest.mark.unit
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_leaves_a_model(script, tmp_path, monkeypatch):
    assert len(script.read_text().splitlines()) < 80
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        forget_accelerate()
    written = [path.parent.name for path in tmp_path.glob("final*/*.safetensors")]
    assert written in (["final-averaged"], ["final"])


def test_the_examples_are_all_in_their_table():
    readme = (Path(__file__).parents[2] / "examples" / "README.md").read_text()
    assert all(f"]({script.name})" in readme for script in EXAMPLES)
