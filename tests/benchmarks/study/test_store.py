"""Rows on disk: cut lines, unfinished cells, and several processes at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.study.store import CLAIMS, append, claim, finished, read_rows

pytestmark = pytest.mark.unit

HOLDER = """
import sys, time
from pathlib import Path
from benchmarks.study.store import claim
with claim(Path(sys.argv[1]), "a") as held:
    print(held, flush=True)
    time.sleep(60)
"""


def rows_of(cell: str, count: int = 2) -> list[dict]:
    same = {"cell": cell, "fingerprint": "f", "machine": {"processor": "p"}, "of": count}
    return [{**same, "readout": f"r{i}", "i": i} for i in range(count)]


def test_a_row_cut_in_the_middle_is_dropped_and_its_cell_is_made_again(tmp_path):
    append(tmp_path, "rows", rows_of("a"))
    append(tmp_path, "rows", rows_of("b"))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert finished(read_rows(tmp_path)) == {("a", "f")}
    append(tmp_path, "rows", rows_of("b"))
    assert finished(read_rows(tmp_path)) == {("a", "f"), ("b", "f")}
    assert len(read_rows(tmp_path)) == 4
    for line in path.read_text().splitlines():
        json.loads(line)


def test_of_rows_made_twice_the_latest_count_and_another_arithmetic_is_another_row(tmp_path):
    append(tmp_path, "rows", rows_of("a", 1))
    append(tmp_path, "rows", [{**rows_of("a", 1)[0], "i": 7}])
    append(tmp_path, "rows", [{**rows_of("a", 1)[0], "fingerprint": "g"}])
    assert sorted((row["fingerprint"], row["i"]) for row in read_rows(tmp_path)) == [("f", 7), ("g", 0)]


def test_rows_of_two_kinds_of_machine_are_both_kept_in_one_order_whichever_file_they_are_in(tmp_path):
    (here,), there = rows_of("a", 1), {"machine": {"processor": "another"}}
    for first, second in (("a", "b"), ("b", "a")):
        append(tmp_path / first, "a", [here | {"failed": "OutOfMemoryError"}])
        append(tmp_path / first, first, [here])
        append(tmp_path / first, second, [here | there])
    pairs = [read_rows(tmp_path / folder) for folder in "ab"]
    assert pairs == [[here | there, here]] * 2
    elsewhere = {**here, **there, "cell": "b", "failed": "MemoryError"}
    append(tmp_path / "a", "c", [{**here, "cell": "b"}, elsewhere])
    assert elsewhere in read_rows(tmp_path / "a")


def test_a_cell_held_by_another_process_is_free_once_that_process_is_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with claim(tmp_path, "a") as held:
        assert not held
    with claim(tmp_path, "b") as held:
        assert held
    holder.kill()
    holder.wait()
    with claim(tmp_path, "a") as held:
        assert held
    assert (tmp_path / CLAIMS).stat().st_size == 0


def test_what_is_no_row_is_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_text('[1]\n{"cell": "a"}\nnot json\n')
    assert read_rows(tmp_path) == []
