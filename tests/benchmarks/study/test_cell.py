"""A cell from its name to its rows, on a tiny task."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.study import __main__ as command
from benchmarks.study import grid, pack, store, tasks
from benchmarks.study import model as encoder
from benchmarks.study.cell import Cell, identity, parse_cell, run_cell
from benchmarks.study.numerics import kind_of
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
    assert all(row["temperature"] > 0 < row["outcomes"]["nll_scaled"] for row in first[:-1])
    losses = [row["outcomes"]["nll"] for row in first[:-1]]
    assert len(set(losses)) == len(losses)  # every readout is other weights


def test_constant_and_two_pass_trainings_have_their_readouts_and_their_divergence(tiny_task):
    plain = run_cell(parse_cell("cr/constant/main/0.0002/1/tuning"))
    dropped = run_cell(parse_cell("cr/rdrop-constant/main/0.0002/1/tuning"))
    assert [row["readout"] for row in plain] == ["last", "swa-0.5"]
    assert plain[0]["noise"]["divergence"] == 0 < dropped[0]["noise"]["divergence"]
    assert plain[0]["settings"]["scored"] == 20


def test_a_distilled_cell_counts_its_teachers_and_learns_from_them(tiny_task):
    (taught,) = run_cell(parse_cell("cr/distilled-ensemble/main/0.0002/1/tuning"))
    (alone,) = run_cell(parse_cell("cr/decayed/main/0.0002/1/tuning"))  # second: the first one warms up
    assert (alone["cost"]["units"], taught["cost"]["units"]) == (1, 4)
    assert taught["cost"]["cpu_seconds"] > 2 * alone["cost"]["cpu_seconds"]
    assert taught["noise"]["divergence"] > 0
    assert taught["outcomes"]["nll"] != alone["outcomes"]["nll"]


def test_a_missing_task_is_recorded_by_name_and_others_are_made(tiny_task, monkeypatch):
    monkeypatch.setattr(
        grid, "all_cells", lambda rows: map(parse_cell, ["trec/decayed/main/0.0002/1/tuning", CR])
    )
    command.main(["run"])
    rows = read_rows(tiny_task / "results")
    assert [row.get("failed", "")[:17] for row in rows if row["task"] == "trec"] == ["FileNotFoundError"]
    assert sum(row["task"] == "cr" for row in rows) == 1
    assert len(finished(rows)) == 2
    assert command.main(["cell", CR, "--check"]) == 0


CR = "cr/decayed/main/0.0002/1/tuning"


def test_a_failed_cell_is_made_again_when_asked_and_only_then(tiny_task, monkeypatch):
    monkeypatch.setattr(grid, "all_cells", lambda rows: map(parse_cell, [CR]))
    whole = command.run_cell
    monkeypatch.setattr(command, "run_cell", lambda cell: 1 / 0)
    command.main(["run"])
    command.main(["run", "--retry"])  # fails again, once
    monkeypatch.setattr(command, "run_cell", whole)
    command.main(["run"])
    assert [row["readout"] for row in read_rows(tiny_task / "results")] == ["failed"]
    command.main(["run", "--retry"])
    assert [row["readout"] for row in read_rows(tiny_task / "results")] == ["last"]


@pytest.mark.parametrize("part", ["noise", "settings", "outcomes"])
def test_a_check_finds_any_other_number_of_the_rows_and_a_readout_that_is_not_made(
    tiny_task, monkeypatch, capsys, part
):
    (row,) = rows = command.make(parse_cell(CR))
    monkeypatch.setattr(command, "run_cell", lambda cell: rows)
    older = {name: row[name] for name in row.keys() - {part}}  # from before this was measured
    store.append(tiny_task / "results", "rows", [older | {"cost": {}, "command": ""}])
    assert command.main(["cell", CR, "--check"]) == 0
    store.append(tiny_task / "results", "rows", [row | {part: {}}])
    assert command.main(["cell", CR, "--check"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"other: last ({part})"
    store.append(tiny_task / "results", "rows", [row, row | {"readout": "another"}])
    assert command.main(["cell", CR, "--check"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "other: another (made or kept only)"


def test_committed_rows_name_the_settings_that_a_cell_names_today_so_that_a_check_can_find_them(tiny_task):
    (made,) = command.make(parse_cell(CR))
    kept = read_rows(Path(store.__file__).parents[1] / "results" / "study")
    measured = [row for row in kept if "failed" not in row and row["split"] != "cycle"]
    assert {tuple(sorted(row["settings"])) for row in measured} == {tuple(sorted(made["settings"]))}


def test_rows_of_a_pack_are_another_kind_of_machine_and_their_command_names_it(monkeypatch):
    ours = identity(parse_cell(CR), "last")
    monkeypatch.setenv("SWAFT_STUDY_PACK", "/a pack")
    theirs = identity(parse_cell(CR), "last")
    assert kind_of(theirs) == f"{kind_of(ours)}, all-MiniLM-L6-v2, rounded to fp16"
    assert theirs["command"] == f"SWAFT_STUDY_PACK='/a pack' {ours['command']}"
    assert theirs["fingerprint"] == ours["fingerprint"]


def test_a_device_out_of_memory_is_recorded_by_name(tiny_task, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(encoder, "pretrained", exhausted)
    (row,) = command.make(parse_cell(CR))
    assert row["failed"].startswith("OutOfMemoryError: tried to allocate")


def test_a_training_that_diverges_is_recorded_as_such(tiny_task):
    (row,) = command.make(Cell("cr", "constant", "main", 1e30, 1, "tuning"))
    assert grid.DIVERGED in row["failed"]


def test_a_pack_holds_the_same_rows_and_an_encoder_to_begin_with(tiny_task, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", {"cr": tasks.TASKS["cr"]})
    before = tasks.load("cr", rows=24, seed=1)
    source = tiny_task / "encoder"
    encoder.pretrained(2, 0, torch.device("cpu")).save_pretrained(source)
    monkeypatch.setattr(pack, "model_folder", lambda: str(source))
    assert command.main(["pack", str(tiny_task / "pack")]) == 0
    monkeypatch.undo()
    monkeypatch.setenv("SWAFT_STUDY_PACK", str(tiny_task / "pack"))
    tasks.read.cache_clear()
    after = tasks.load("cr", rows=24, seed=1)
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(before, part), getattr(after, part)
        assert (ours.ids, ours.segments) == (theirs.ids, theirs.segments)
        assert torch.equal(ours.labels, theirs.labels)
    model = encoder.pretrained(3, 0, torch.device("cpu"))
    assert encoder.logits_of(model, after.test).shape == (20, 3)
    assert next(model.parameters()).dtype == torch.float32
    tasks.read.cache_clear()


def test_rows_go_to_one_file_when_asked_and_what_is_there_is_not_made_again(tiny_task, monkeypatch):
    monkeypatch.setattr(grid, "all_cells", lambda rows: map(parse_cell, [CR]))
    assert command.main(["run", "--seconds", "100", "--file", "all"]) == 0
    assert command.main(["run", "--file", "all"]) == 0
    (only,) = (tiny_task / "results").glob("*.jsonl")
    assert (only.name, len(only.read_text().splitlines())) == ("all.jsonl", 1)


def test_no_cell_is_begun_that_would_end_past_the_time_that_is_given(monkeypatch):
    now, made = [1000.0], []

    def make(*_):
        made.append(now[0])
        now[0] += 30
        return parse_cell(CR), False

    monkeypatch.setattr(command, "_make_next", make)
    monkeypatch.setattr(command.time, "time", lambda: now[0])
    assert command.main(["run", "--seconds", "100"]) == 0
    assert made == [1000, 1030, 1060]  # a fourth would end at 1120
    now[0] = 1000.0
    assert command.main(["run", "--until", "1050"]) == 0
    assert made[3:] == [1000]


@pytest.mark.slow
def test_several_processes_make_cells_of_a_pack_alone_within_their_time(tiny_task, monkeypatch):
    """The command for a card, on a CPU: no folder of data, no embedded model."""
    source, folder, rows = (tiny_task / name for name in ("encoder", "pack", "rows"))
    encoder.pretrained(2, 0, torch.device("cpu")).save_pretrained(source)
    monkeypatch.setattr(tasks, "TASKS", {"cr": tasks.TASKS["cr"]})
    monkeypatch.setattr(pack, "model_folder", lambda: str(source))
    command.main(["pack", str(folder)])
    elsewhere = {"SWAFT_STUDY_PACK": str(folder), "SWAFT_STUDY": str(rows), "SWAFT_DATA": "/nowhere"}
    words = ["run", "--jobs", "2", "--seconds", "90", "--file", "card"]
    began = time.monotonic()
    root = Path(command.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.study", *words], cwd=root, env=os.environ | elsewhere, check=True
    )
    assert time.monotonic() - began < 150
    found = read_rows(rows)
    assert [path.name for path in rows.glob("*.jsonl")] == ["card.jsonl"]
    made = [row for row in found if row["task"] == "cr" and "failed" not in row]
    assert len({row["cell"] for row in made}) >= 2
    assert {row["settings"]["model"] for row in made} == {"all-MiniLM-L6-v2, rounded to fp16"}
    assert all("holds no" in row["failed"] for row in found if row["task"] != "cr")


def test_a_name_that_is_no_cell_is_refused_with_what_is_expected():
    with pytest.raises(ValueError, match=r"expected task/training/regime/rate/seed/split"):
        parse_cell("trec/decayed/main/0.0001/1/train")
