from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from launching import forget_accelerate


@pytest.fixture(autouse=True)
def one_process(monkeypatch) -> Iterator[None]:
    """Every test starts and leaves accelerate blank."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_MIXED_PRECISION",
    ):
        monkeypatch.delenv(name, raising=False)
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def make_accelerator():
    def make(accumulation: int = 1) -> Accelerator:
        plugin = GradientAccumulationPlugin(num_steps=accumulation)
        return Accelerator(cpu=True, gradient_accumulation_plugin=plugin)

    return make


@pytest.fixture
def run(make_accelerator, tmp_path):
    """Trains as a recipe does (`tiny_loop.train`), each time in a folder of its own unless one is given."""
    from tiny_loop import train  # here: most tests train nothing

    def call(model, rows, **settings):
        folder = {"output_dir": str(tmp_path / str(len(list(tmp_path.iterdir()))))}
        return train(make_accelerator, model, rows, **(folder | settings))

    return call
