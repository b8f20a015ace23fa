"""A cell from its name to its rows, on a tiny task."""

from __future__ import annotations

import pytest
import torch

from benchmarks.study import __main__ as command
from benchmarks.study import model as encoder
from benchmarks.study.cell import parse_cell, run_cell
from benchmarks.study.readouts import readouts_for
from benchmarks.study.store import finished, read_rows
from benchmarks.study.trainings import TRAININGS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("training", ["decayed", "r3f-relative-1.0-constant"])
def test_a_cell_made_twice_has_the_same_bits(tiny_task, training):
    cell = parse_cell(f"cr/{training}/main/0.0002/1/test")
    first, second = run_cell(cell), run_cell(cell)
    assert [row["outcomes"] for row in first] == [row["outcomes"] for row in second]
    expected = [readout.name for readout in readouts_for(TRAININGS[training])] + ["chosen"]
    assert [row["readout"] for row in first] == expected
    assert {row["of"] for row in first} == {len(expected)}
    assert first[0]["rounded"].keys() == {"bf16", "int8", "int4"}
    losses = [row["outcomes"]["nll"] for row in first[:-1]]
    assert len(set(losses)) == len(losses)  # every readout is other weights


def test_constant_and_two_pass_trainings_have_their_readouts_and_their_divergence(tiny_task):
    plain = run_cell(parse_cell("cr/constant/main/0.0002/1/tuning"))
    dropped = run_cell(parse_cell("cr/rdrop-constant/main/0.0002/1/tuning"))
    assert [row["readout"] for row in plain] == ["last", "swa-0.5"]
    assert plain[0]["noise"]["divergence"] == 0 < dropped[0]["noise"]["divergence"]
    assert plain[0]["settings"]["scored"] == 20


def test_a_distilled_cell_counts_its_teachers_and_learns_from_them(tiny_task):
    (alone,) = run_cell(parse_cell("cr/decayed/main/0.0002/1/tuning"))
    (taught,) = run_cell(parse_cell("cr/distilled-ensemble/main/0.0002/1/tuning"))
    assert (alone["cost"]["units"], taught["cost"]["units"]) == (1, 4)
    assert taught["cost"]["cpu_seconds"] > 2 * alone["cost"]["cpu_seconds"]
    assert taught["noise"]["divergence"] > 0
    assert taught["outcomes"]["nll"] != alone["outcomes"]["nll"]


def test_a_missing_task_is_recorded_by_name_and_others_are_made(tiny_task, monkeypatch):
    monkeypatch.setattr(
        command, "all_cells", lambda rows: map(parse_cell, ["trec/decayed/main/0.0002/1/tuning", CR])
    )
    command.run_grid(jobs=1, limit=None)
    rows = read_rows(tiny_task / "results")
    assert [row.get("failed", "")[:17] for row in rows if row["task"] == "trec"] == ["FileNotFoundError"]
    assert sum(row["task"] == "cr" for row in rows) == 1
    assert len(finished(rows)) == 2
    assert command.main(["cell", CR, "--check"]) == 0


CR = "cr/decayed/main/0.0002/1/tuning"


def test_a_failed_cell_is_made_again_when_asked_and_only_then(tiny_task, monkeypatch):
    monkeypatch.setattr(command, "all_cells", lambda rows: map(parse_cell, [CR]))
    whole = command.run_cell
    monkeypatch.setattr(command, "run_cell", lambda cell: 1 / 0)
    command.run_grid(jobs=1, limit=None)
    command.run_grid(jobs=1, limit=None, retry=True)  # fails again, once
    monkeypatch.setattr(command, "run_cell", whole)
    command.run_grid(jobs=1, limit=None)
    assert [row["readout"] for row in read_rows(tiny_task / "results")] == ["failed"]
    command.run_grid(jobs=1, limit=None, retry=True)
    assert [row["readout"] for row in read_rows(tiny_task / "results")] == ["last"]


def test_a_device_out_of_memory_is_recorded_by_name(tiny_task, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(encoder, "pretrained", exhausted)
    (row,) = command.make(parse_cell(CR))
    assert row["failed"].startswith("OutOfMemoryError: tried to allocate")


def test_a_name_that_is_no_cell_is_refused_with_what_is_expected():
    with pytest.raises(ValueError, match=r"expected task/training/regime/rate/seed/split"):
        parse_cell("trec/decayed/main/0.0001/1/train")
