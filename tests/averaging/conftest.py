from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def mapped_files() -> Callable[[Path], int]:
    """Tells how many files without a name, of a folder, this process has mapped."""

    def count(folder: Path) -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum(str(folder) in line and line.endswith("(deleted)") for line in maps)

    return count
