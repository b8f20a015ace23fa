"""What two recordings differ in is named."""

from __future__ import annotations

import copy

import pytest
from golden import RUNS, compare, differences, without_times

pytestmark = pytest.mark.unit

OUTCOME = {
    "weights": {"final/model.safetensors": "a1", "final-averaged/model.safetensors": "b2"},
    "metrics": [{"kind": "train", "step": 2, "loss": 0.5}, {"kind": "train", "step": 4, "loss": 0.25}],
}
CONDITIONS = {"commit": "c3", "code": "d4", "versions": {"torch": "2"}}


def changed(change):
    outcome = copy.deepcopy(OUTCOME)
    change(outcome)
    return list(differences(OUTCOME, outcome))


def test_the_first_line_and_every_file_that_differ_are_named():
    assert not changed(lambda outcome: None)
    assert changed(lambda o: o["weights"].update({"final/model.safetensors": "a2"})) == [
        "final/model.safetensors has other bits"
    ]
    assert changed(lambda o: o["weights"].pop("final/model.safetensors")) == [
        "final/model.safetensors is missing"
    ]
    assert changed(lambda o: o["weights"].update({"best/model.safetensors": "e5"})) == [
        "best/model.safetensors is new"
    ]
    assert changed(lambda o: o["metrics"][1].update({"loss": 0.2500000000000001})) == [
        "metrics.jsonl, line 2: loss 0.25 -> 0.2500000000000001"
    ]
    assert changed(lambda o: o["metrics"][0].pop("loss")) == ["metrics.jsonl, line 1: loss 0.5 -> None"]
    assert changed(lambda o: o["metrics"].pop()) == ["metrics.jsonl has 1 lines, and had 2"]


def test_recordings_are_compared_run_by_run_and_what_one_lacks_is_counted(capsys):
    before = {"made_with": CONDITIONS, "runs": {"one": OUTCOME, "two": OUTCOME}}
    assert compare(before, before | {"made_with": CONDITIONS | {"commit": "f6", "code": "07"}}) == 0
    assert capsys.readouterr().out == "the same: 2 runs\n"
    other = copy.deepcopy(OUTCOME)
    other["weights"]["final/model.safetensors"] = "a2"
    after = {"made_with": CONDITIONS | {"versions": {"torch": "3"}}, "runs": {"two": other}}
    assert compare(before, after) == 1
    said = capsys.readouterr().out
    assert "recorded with other versions" in said
    assert "two: final/model.safetensors has other bits" in said
    assert "not compared: 1 runs that one of the recordings lacks" in said
    assert compare(before, after | {"runs": {}}) == 1  # nothing was held to anything


def test_only_times_are_left_out_of_the_metrics():
    record = {"kind": "train", "step": 2, "loss": 0.5, "seconds": 1.5, "tokens_per_second": 9.0}
    assert without_times(record) == {"kind": "train", "step": 2, "loss": 0.5}


def test_there_are_thirty_runs_each_under_a_name_of_its_own():
    assert len({run.name for run in RUNS}) == len(RUNS) == 30
