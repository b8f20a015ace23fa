"""A run that goes on in new processes takes the steps of an unbroken one: rates, rows, noise, dropout, averages."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import ENGINES, Zygote, differences, ending
from spy import EXPORTED, read_average, read_beginnings, read_steps
from transformers import AutoModelForSequenceClassification

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]

SETTINGS = ("train.lr_scheduler_type=cosine", "train.save_steps=7")
STEPS, ROWS, BATCH = 24, 70, 4
KILLED_AT, ITS_CHECKPOINT = 16, 14
ASKED_AT = 13
CASES = {  # neither 13 nor 14 is the end of a pass, nor a step of which an evaluation follows
    "ddp-killed": ("ddp", signal.SIGKILL),
    "ddp-asked": ("ddp", signal.SIGTERM),
    "ddp3-killed": ("ddp3", signal.SIGKILL),
    "plain-asked": ("plain", signal.SIGTERM),
    "zero2-killed": ("zero2", signal.SIGKILL),
    "zero3-asked": ("zero3", signal.SIGTERM),
    "fsdp2-killed": ("fsdp2", signal.SIGKILL),
}
SHORT = "ddp-killed"
TAKEN = ["rates", "rows", "noise", "masks"]
LEFT = ["weights", "count", "average", "random"]


@dataclass(frozen=True)
class Runs:
    """An unbroken run, and one that was ended and has gone on; what their ranks wrote is in a folder of each."""

    unbroken: Path
    broken: Path
    ended_at: int
    """Last step of the processes that were ended."""
    goes_on_after: int
    """Step of the checkpoint."""

    @property
    def pairs(self) -> list[tuple[dict[int, Any], dict[int, Any], dict[int, Any]]]:
        """Of each rank the steps of the unbroken run, those before the end, and those after."""
        found = [read_steps(where / each) for where, each in self.places]
        return list(zip(*found, strict=True))

    @property
    def places(self) -> list[tuple[Path, str]]:
        return [(self.unbroken, "spy"), (self.broken, "spy"), (self.broken, "spy-after")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[] if case == SHORT else pytest.mark.slow) for case in CASES],
)
def runs(request, started, run_inputs, tmp_path_factory) -> Runs:
    """The runs of one engine and one way to end."""
    return end_and_go_on(started, run_inputs, tmp_path_factory.mktemp("runs"), *CASES[request.param])


def end_and_go_on(
    started: Zygote, inputs: Path, folder: Path, name: str, number: int, *settings: str
) -> Runs:
    """Run undisturbed in one folder; run, be ended by a signal and go on in another."""
    engine, killed = ENGINES[name], number == signal.SIGKILL
    unbroken, broken = folder / "unbroken", folder / "broken"
    at = KILLED_AT if killed else ASKED_AT
    victims = list(range(engine.ranks)) if killed else [engine.ranks - 1]
    end = {"victims": victims, "at_step": at, "signal": int(number)}
    ends_with = -number if killed else 75
    for where, spy, options, code in (
        (unbroken, "spy", {}, 0),
        (broken, "spy", end, ends_with),
        (broken, "spy-after", {}, 0),
    ):
        where.mkdir(exist_ok=True)
        spied = str(where / spy)
        found = started.run(engine, where / "run", inputs, *SETTINGS, *settings, spy=spied, **options)
        assert found["codes"] == [code] * engine.ranks, (where / "run.log").read_text()[-4000:]
    environment = json.loads((broken / "run" / "env.json").read_text())
    assert environment["world_size"] == engine.ranks
    assert environment["engine"].endswith("ddp" if name == "ddp3" else name)
    return Runs(unbroken, broken, at, ITS_CHECKPOINT if killed else at)


def test_it_goes_on_after_its_checkpoint_and_takes_every_step_that_is_left(runs):
    log = (runs.broken / "run.log").read_text()
    assert f"checkpoint-{runs.goes_on_after}, after step {runs.goes_on_after} of {STEPS}" in log
    for unbroken, before, after in runs.pairs:
        assert list(unbroken) == list(range(1, STEPS + 1))
        assert list(before) == list(range(1, runs.ended_at + 1))
        assert list(after) == list(range(runs.goes_on_after + 1, STEPS + 1))


@pytest.mark.parametrize("what", TAKEN + LEFT)
def test_each_step_takes_and_leaves_what_it_did_in_the_unbroken_run(runs, what):
    for unbroken, before, after in runs.pairs:
        for step, line in chain(before.items(), after.items()):
            assert line[what] == unbroken[step][what], step
        values = [json.dumps(line[what]) for line in unbroken.values()]
        assert len(set(values)) > STEPS / 2  # or equality would say nothing


def test_a_run_that_averages_nothing_goes_on_likewise(started, run_inputs, tmp_path):
    settings = ("averaging.rule=none", "averaging.start=null", "eval.keep_best=last")
    runs = end_and_go_on(started, run_inputs, tmp_path, "plain", signal.SIGTERM, *settings)
    for unbroken, before, after in runs.pairs:
        assert len(after) == STEPS - ASKED_AT
        assert unbroken == before | after
    assert not differences(ending(runs.broken / "run"), ending(runs.unbroken / "run"))


def test_it_comes_to_the_end_of_the_unbroken_run(runs):
    assert not differences(ending(runs.broken / "run"), ending(runs.unbroken / "run"))


def test_before_its_checkpoint_is_loaded_a_new_process_stands_where_a_new_run_does(runs):
    new = read_beginnings(runs.unbroken / "spy")
    again = read_beginnings(runs.broken / "spy-after")
    for rank, (unbroken, _, _) in enumerate(runs.pairs):
        before, began = again[rank]["before"], again[rank]["began"]
        assert before == new[rank]["began"]
        assert began == {what: unbroken[runs.goes_on_after][what] for what in LEFT}
        assert not [what for what in LEFT if before[what] == began[what]]


def test_the_averages_are_exported_as_they_lie_in_the_checkpoint_rounded_once(runs):
    spy = runs.broken / "spy-after"
    saved = {name: vector for (key, name), vector in read_average(spy / "average").items() if "mean" in key}
    for dtype in EXPORTED:
        model = AutoModelForSequenceClassification.from_pretrained(spy / str(dtype), dtype="auto")
        found = model.state_dict()
        assert found.keys() == saved.keys()
        for name, vector in saved.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], vector.to(dtype)), name


def test_a_run_that_begins_anew_takes_other_steps_than_one_that_goes_on(runs):
    for unbroken, _, after in runs.pairs:
        first, next_one = unbroken[1], after[runs.goes_on_after + 1]
        assert not [what for what in TAKEN + LEFT if first[what] == next_one[what]]


def test_no_two_ranks_or_steps_draw_the_same_noise_or_drop_out_the_same_units(runs):
    ranks = [list((before | after).values()) for _, before, after in runs.pairs]
    for what in ("noise", "streams"):
        drawn = [each for line in chain(*ranks) for each in line[what]]
        assert len(drawn) == sum(len(line["rows"]) for line in chain(*ranks))
        assert len(set(drawn)) == len(drawn)
    masks = [line["masks"] for line in chain(*ranks)]
    assert len(set(masks)) == len(masks)


def test_each_pass_reads_every_row_in_an_order_of_its_own(runs):
    ranks = [
        list(chain(*(line["rows"] for line in (before | after).values()))) for _, before, after in runs.pairs
    ]
    micro_batches = [list(chain(*each)) for each in zip(*ranks, strict=True)]
    length = ceil(ceil(ROWS / BATCH) / len(ranks))
    passes = [list(chain(*micro_batches[i : i + length])) for i in range(0, len(micro_batches), length)][:-1]
    assert len(passes) >= 2
    assert all(set(rows) == set(range(ROWS)) for rows in passes)
    assert len(set(map(tuple, passes))) == len(passes)
