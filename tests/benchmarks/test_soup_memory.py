"""The benchmark of `swaft average`, on a tiny model: it runs, and no figure is missing."""

from __future__ import annotations

import json

import pytest

from benchmarks import soup_memory

pytestmark = pytest.mark.unit


def test_peak_memory_is_measured_for_few_checkpoints_and_many(tmp_path):
    soup_memory.main(["--quick", "--out", str(tmp_path / "soup.json")])
    found = json.loads((tmp_path / "soup.json").read_text())["memory"]
    assert found["by checkpoints"].keys() == {"2", "20"}
    for figures in found["by checkpoints"].values():
        assert 0 < figures["anonymous bytes before"] <= figures["peak anonymous bytes"] < soup_memory.BAR
