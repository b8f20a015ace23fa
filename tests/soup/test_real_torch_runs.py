from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_ranks
from safetensors.torch import load_file
from soup_folders import folder_of, golden, loaded, same_bits
from torch_run_checkpoints import Net, stored

from swaft.soup import average, last_checkpoints

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run of two ranks under each engine, with the live weights of its steps."""
    folder = tmp_path_factory.mktemp("torch-runs")
    code, output = run_ranks([Path(__file__).with_name("torch_run_worker.py"), folder])
    assert code == 0, output[-6000:]
    return folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_average_of_what_two_ranks_leave_is_the_mean_of_the_whole_weights(runs, tmp_path, engine):
    lives = [load_file(runs / f"{engine}-{step}.safetensors") for step in (1, 2, 3)]
    base = folder_of(tmp_path / "base", stored(Net(0)))
    average(last_checkpoints(runs / engine, 3), tmp_path / "out", base=base, trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), golden(lives))
