"""A run that was ended goes on under another engine or number of ranks, or is refused and nothing is changed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_inputs import save_inputs
from faults import Engine
from safetensors.torch import load_file
from spy import read_average, read_steps
from tiny_inputs import save_rows
from torch import Tensor

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]

STEPS, ENDED_AT = 12, 5  # in the second pass of 3 steps, the last of which leaves a rank without rows
SETTINGS = (
    *(
        f"train.max_steps={STEPS}",
        "train.save_steps=null",
        "train.logging_steps=3",
        "train.learning_rate=1e-3",
    ),
    *("train.lr_scheduler_type=cosine", "averaging.start=0.1"),
    *("noise.kind=none", "eval.eval_steps=4", "eval.keep_best=either"),
)
FURTHEST = 2e-7
"""What a weight may differ by at the end, where gradients are summed in another order; measured: 1.5e-8."""


@dataclass(frozen=True)
class Layout:
    """An engine, and its share of the 24 rows of an optimizer step."""

    engine: Engine
    batch: int
    accumulation: int = 2

    @property
    def settings(self) -> list[str]:
        return [
            f"train.per_device_train_batch_size={self.batch}",
            f"train.gradient_accumulation_steps={self.accumulation}",
        ]


LAYOUTS = {
    "plain": Layout(Engine("single.yaml", 1), 6, 4),
    "ddp": Layout(Engine("ddp_cpu.yaml", 2), 6),
    "ddp x3": Layout(Engine("ddp_cpu.yaml", 3), 4),
    "fsdp2": Layout(Engine("fsdp2_cpu.yaml", 2), 6),
    "fsdp2 x3": Layout(Engine("fsdp2_cpu.yaml", 3), 4),
    "zero2": Layout(Engine("zero2_cpu.yaml", 2), 6),
    "zero2 x3": Layout(Engine("zero2_cpu.yaml", 3), 4),
    "zero3": Layout(Engine("zero3_cpu.yaml", 2), 6),
}
CHANGES = [
    ("ddp", "plain"),
    ("plain", "ddp"),
    ("ddp", "fsdp2"),
    ("fsdp2", "ddp x3"),
    ("fsdp2", "fsdp2 x3"),
    ("fsdp2", "plain"),
]
REFUSED = {
    ("ddp", "zero2"): "under torch alone by 2 ranks, but this run is DeepSpeed stage 2 on 2",
    ("zero2", "zero2 x3"): "under DeepSpeed stage 2 by 2 ranks, but this run is DeepSpeed stage 2 on 3",
    ("zero2", "zero3"): "under DeepSpeed stage 2 by 2 ranks, but this run is DeepSpeed stage 3 on 2",
    ("zero3", "ddp"): "under DeepSpeed stage 3 by 2 ranks, but this run is torch alone on 2",
}


def first_is_short(pairs) -> list[Any]:
    return [
        pytest.param(pair, marks=[pytest.mark.slow] if number else [], id=" to ".join(pair))
        for number, pair in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def run(started, tmp_path_factory):
    """Start a run in a folder, or the rest of it, under a layout."""
    inputs = save_inputs(tmp_path_factory.mktemp("other-ranks-inputs"))
    save_rows(inputs / "train.csv", 51, seed=1)
    config = inputs / "model" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | still))

    def start(name: str, folder: Path, **options: Any) -> list[int]:
        layout = LAYOUTS[name]
        return started.run(layout.engine, folder, inputs, *SETTINGS, *layout.settings, **options)["codes"]

    return start


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory) -> Path:
    """The folder of a run that nobody has touched, with what it did in `spy`."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run("plain", folder / "run", spy=str(folder / "spy")) == [0]
    return folder


@pytest.fixture(scope="module")
def ended(run, tmp_path_factory) -> Callable[[str, Path], Path]:
    """Copy a run that was asked to end; returns the checkpoint that it has left."""
    known: dict[str, Path] = {}

    def copy(name: str, folder: Path) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("ended") / "run"
            end = {"victims": [0], "at_step": ENDED_AT, "signal": int(signal.SIGTERM)}
            codes = run(name, known[name], spy=str(known[name].with_name("spy")), **end)
            assert set(codes) == {75}, known[name].with_suffix(".log").read_text()[-4000:]
        shutil.copytree(known[name], folder)
        return folder / f"checkpoint-{ENDED_AT}"

    return copy


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, and the digest of its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def content_of(state: Path) -> dict[str, Any]:
    """What a state of the averages says about itself."""
    return json.loads((state / "manifest.json").read_text())["content"]


def told_by(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows_of(steps: list[dict[int, Any]], step: int) -> list[int]:
    """What all ranks together read at a step, in the order of the numbers."""
    return sorted(chain(*(micro_batch for rank in steps for micro_batch in rank[step]["rows"])))


@dataclass(frozen=True)
class Change:
    """A run that has gone on elsewhere."""

    before: Layout
    now: Layout
    folder: Path
    spy: Path
    averages: dict[tuple[str, str], Tensor]
    """As they were saved."""
    described: dict[str, Any]
    """What their manifest said."""

    @property
    def log(self) -> str:
        return self.folder.with_suffix(".log").read_text()


@pytest.fixture(scope="module", params=first_is_short(CHANGES))
def change(request, run, ended, tmp_path_factory) -> Change:
    before, now = request.param
    folder = tmp_path_factory.mktemp("change") / "run"
    spy, average = folder.with_name("spy"), ended(before, folder) / "average"
    saved = read_average(average), content_of(average)
    codes = run(now, folder, spy=str(spy))
    found = Change(LAYOUTS[before], LAYOUTS[now], folder, spy, *saved)
    assert set(codes) == {0}, found.log[-4000:]
    return found


def test_a_run_goes_on_at_its_step_under_another_engine_or_number_of_ranks(change):
    checkpoint = change.folder / f"checkpoint-{ENDED_AT}"
    assert f"resuming from {checkpoint}, after step {ENDED_AT} of {STEPS}" in change.log
    ranks = read_steps(change.spy)
    assert [list(rank) for rank in ranks] == [list(range(ENDED_AT + 1, STEPS + 1))] * change.now.engine.ranks
    other_number = change.now.engine.ranks != change.before.engine.ranks
    assert ("dropout is reseeded" in change.log) == other_number


def test_its_averages_have_the_bits_that_were_saved(change):
    opened = read_average(change.spy / "average")
    assert opened.keys() == change.averages.keys()
    assert all(torch.equal(opened[key], vector) for key, vector in change.averages.items())
    assert content_of(change.spy / "average") == change.described
    assert change.described["rules"][0]["count"] > 1


def test_its_steps_take_the_rows_and_the_rates_of_an_unbroken_run(change, undisturbed):
    expected, found = read_steps(undisturbed / "spy"), read_steps(change.spy)
    for step in found[0]:
        assert rows_of(found, step) == rows_of(expected, step)
        for what in ("rates", "count"):
            assert {str(rank[step][what]) for rank in found} == {str(expected[0][step][what])}


def test_it_learns_what_an_unbroken_run_does(change, undisturbed):
    for kind in ("final", "final-averaged"):
        expected, found = (
            load_file(run / kind / "model.safetensors") for run in (undisturbed / "run", change.folder)
        )
        assert found.keys() == expected.keys()
        far = {name: float((found[name] - expected[name]).abs().max()) for name in found}
        # The gradient of the keys' biases is zero but for rounding, of which AdamW makes steps of full size.
        assert not {name: most for name, most in far.items() if most > FURTHEST and "key.bias" not in name}


def test_it_tells_every_step_once_and_keeps_the_same_best_weights(change, undisturbed):
    expected, found = told_by(undisturbed / "run"), told_by(change.folder)
    assert [(line["kind"], line["step"]) for line in found] == [
        (line["kind"], line["step"]) for line in expected
    ]
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    bests = [
        json.loads((run / "summary.json").read_text())["best"] for run in (change.folder, undisturbed / "run")
    ]
    assert bests[0] == bests[1]
    assert (change.folder / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("pair", first_is_short(REFUSED))
def test_a_state_that_does_not_fit_is_refused_by_every_rank_and_nothing_is_changed(
    run, ended, tmp_path, pair
):
    (before, now), words = pair, REFUSED[pair]
    folder = tmp_path / "run"
    checkpoint = ended(before, folder)
    held = contents(folder)
    codes = run(now, folder)
    said = folder.with_suffix(".log").read_text()
    assert codes == [1] * LAYOUTS[now].engine.ranks, said[-4000:]
    assert said.count("error: ") == 1
    assert f"{checkpoint} was written {words}" in said
    assert f"averager.load_state('{checkpoint}/average'" in said
    assert "Traceback" not in said
    assert contents(folder) == held
