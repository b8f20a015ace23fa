from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.deadline import within
from benchmarks.gpu.__main__ import Part, parts, run_part

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

WITHOUT_KIT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "omegaconf", "deepspeed", "peft", "trl"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import runpy
sys.argv = ["probes", sys.argv[1], "--quick"]
runpy.run_module("benchmarks.gpu.probes", run_name="__main__")
"""


def test_the_probes_run_from_a_source_tree_without_what_recipes_need(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_KIT, str(tmp_path / "out.json")], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["averaging 100,000"]["event ms"] > 0
    assert found["loss (32, 16, 200)"]["ms"] > 0


def test_a_part_that_lacks_a_package_is_skipped_by_name(tmp_path):
    part = Part(10, ("-c", "raise SystemExit(1)"), needs=("no_such_package",))
    found = run_part("x", part, tmp_path, until=float("inf"), dry=False)
    assert found == {"skipped": "missing: no_such_package"}


def test_a_part_past_its_limit_is_ended_and_the_time_of_all_is_kept(tmp_path):
    endless = Part(10, ("-c", "import time; time.sleep(99)"))
    assert run_part("x", endless, tmp_path, until=0.0, dry=False)["skipped"].startswith("out of time")
    part = Part(10, ("-c", "import os; print(os.environ['SWAFT_BENCH_UNTIL'])"))
    assert run_part("y", part, tmp_path, until=float("inf"), dry=False)["exit code"] == 0
    assert float((tmp_path / "y.log").read_text()) > 0


def test_every_part_names_files_that_exist(tmp_path):
    for part in parts(tmp_path).values():
        for word in part.words:
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def test_what_is_out_of_time_is_recorded_as_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("SWAFT_BENCH_UNTIL", "0")
    assert "out of time" in str(within("x", 1.0, dict)["skipped"])
    monkeypatch.delenv("SWAFT_BENCH_UNTIL")
    monkeypatch.setenv("SWAFT_BENCH_PARTIAL", str(tmp_path / "partial.jsonl"))
    assert within("x", 1.0, lambda: {"a": 1}) == {"a": 1}
    assert json.loads((tmp_path / "partial.jsonl").read_text()) == {"name": "x", "found": {"a": 1}}
