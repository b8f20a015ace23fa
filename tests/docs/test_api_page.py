from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_says_what_the_docstrings_say():
    script = (
        f"import sys; sys.path.insert(0, {str(DOCS)!r}); import make_api; print(make_api.reference(), end='')"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "api.md").read_text(), "the docstrings have changed: run python docs/make_api.py"
