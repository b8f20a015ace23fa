"""What the tests of faults share: a process that starts ranks, inputs, unbroken runs, a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_inputs import save_inputs
from faults import ENGINES, Ending, Zygote, ending, zygote


@pytest.fixture(scope="session")
def started() -> Iterator[Zygote]:
    """What starts ranks."""
    with zygote() as process:
        yield process


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory) -> Path:
    """A folder with model, data and configuration."""
    return save_inputs(tmp_path_factory.mktemp("fault-inputs"))


@pytest.fixture(scope="session")
def unbroken(started, run_inputs, tmp_path_factory) -> Callable[[str], tuple[Ending, float]]:
    """What an unbroken run of an engine leaves, and how many seconds it takes; each is run once."""
    known: dict[str, tuple[Ending, float]] = {}

    def run(engine: str) -> tuple[Ending, float]:
        if engine not in known:
            folder = tmp_path_factory.mktemp("unbroken") / engine
            found = started.run(ENGINES[engine], folder, run_inputs)
            assert set(found["codes"]) == {0}, folder.with_suffix(".log").read_text()[-4000:]
            known[engine] = ending(folder), found["seconds"]
        return known[engine]

    return run


@pytest.fixture
def memory(tmp_path) -> Iterator[Path | str]:
    """A folder with a file system of its own of 20 MB, in memory; or in words why none can be mounted."""
    folder = tmp_path / "memory"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if wrong := subprocess.run(mount, capture_output=True, text=True, timeout=20).stderr.strip():
        yield wrong
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)
