"""What the tests of faults share: a process that starts ranks, inputs, unbroken runs, a small disk."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_inputs import save_inputs
from faults import ENGINES, Ending, Zygote, ending, zygote
from small_disks import file_system

from swaft.training.launch.failure import EXIT_CODE
from swaft.training.run.checkpoints import find_checkpoints


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


@pytest.fixture(scope="session")
def asked_to_end(started, run_inputs, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run with some settings that was asked to end on its way, to be copied and gone on with."""
    known: dict[tuple[str, ...], Path] = {}

    def run(engine: str, *settings: str) -> Path:
        if (engine, *settings) not in known:
            folder = tmp_path_factory.mktemp("asked") / engine
            found = started.run(
                ENGINES[engine], folder, run_inputs, *settings,
                victims=[0], signal=int(signal.SIGTERM), at_log="step 15/24",
            )  # fmt: skip
            assert set(found["codes"]) == {EXIT_CODE}, folder.with_suffix(".log").read_text()[-4000:]
            assert len(find_checkpoints(folder)) == 2
            known[(engine, *settings)] = folder
        return known[(engine, *settings)]

    return run


@pytest.fixture
def memory(tmp_path) -> Iterator[Path | str]:
    """A folder with a file system of its own of 20 MB, in memory; or in words why none can be mounted."""
    with file_system(tmp_path / "memory", size="20m") as wrong:
        yield wrong or tmp_path / "memory"
