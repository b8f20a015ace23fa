"""Ranks that one machine can hardly have are planned as asked for, and questioned."""

from __future__ import annotations

from pathlib import Path

import pytest

from swaft.training.launch.launcher import read_launch
from swaft.training.planning.plan import machine_notes

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


def notes_for(file: str, ranks: int, *more: str) -> list[str]:
    where = ("--config_file", f"launch/accelerate/{file}.yaml", "--num_processes", str(ranks))
    return machine_notes(read_launch([*where, *more, "recipes/classification.py"]))


@pytest.mark.parametrize(
    ("file", "meant"),
    [
        ("ddp", "ddp_multinode.yaml and"),
        ("fsdp2", "fsdp2_multinode.yaml and"),
        ("zero1", "zero2_multinode.yaml with --deepspeed_config_file ds_configs/zero1.json and"),
        ("zero2", "zero2_multinode.yaml and"),
        ("zero3", "zero3_multinode.yaml and"),
    ],
)
def test_the_launch_file_for_several_machines_is_named(file, meant, monkeypatch):
    monkeypatch.chdir(ROOT)
    [note] = notes_for(file, 64)
    assert f"launch/accelerate/{meant} --num_machines" in note
    assert notes_for(file, 8) == []


def test_the_file_that_is_named_starts_the_same_engine(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ("--num_machines", "8", "--deepspeed_config_file", "ds_configs/zero1.json")
    assert notes_for("zero2_multinode", 64, *words) == []
    line = ["--config_file", "launch/accelerate/zero2_multinode.yaml", "--num_processes", "64", *words]
    assert read_launch([*line, "recipes/classification.py"]).engine == "DeepSpeed ZeRO-1"
