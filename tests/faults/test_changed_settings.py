"""Settings that are not what they were when a run goes on: obeyed and said, or refused with the setting's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import ENGINES
from safetensors.torch import load_file

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(600)]

EVERY_ENGINE = [
    "plain",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2", "zero3", "fsdp2")),
]


PLAIN = ("averaging.rule=none", "averaging.start=null", "eval.keep_best=last")


def weight_norm(folder: Path) -> float:
    """Of the matrices, which are decayed, at the end of a run."""
    tensors = load_file(folder / "final" / "model.safetensors").values()
    return sum(tensor.double().square().sum().item() for tensor in tensors if tensor.ndim > 1) ** 0.5


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_another_weight_decay_is_obeyed_and_said(started, run_inputs, asked_to_end, tmp_path, engine):
    norms = {}
    for decay in ("0.0", "50.0"):
        folder = shutil.copytree(asked_to_end(engine, *PLAIN), tmp_path / decay)
        settings = (*PLAIN, f"train.weight_decay={decay}")
        assert set(started.run(ENGINES[engine], folder, run_inputs, *settings)["codes"]) == {0}
        assert f"train.weight_decay: 0.01 before, {decay} now" in folder.with_suffix(".log").read_text()
        norms[decay] = weight_norm(folder)
    assert norms["50.0"] < 0.99 * norms["0.0"]


def test_averaging_cannot_begin_in_the_middle_of_a_run(started, run_inputs, asked_to_end, tmp_path):
    folder = shutil.copytree(asked_to_end("plain", *PLAIN), tmp_path / "run")
    assert started.run(ENGINES["plain"], folder, run_inputs, "eval.keep_best=last")["codes"] != [0]
    said = folder.with_suffix(".log").read_text()
    assert "averaging.rule:" in said
    assert "of a run that averaged nothing (averaging.rule=none)" in said
    assert not (folder / "summary.json").exists()


def test_averaging_cannot_end_in_the_middle_of_a_run(started, run_inputs, asked_to_end, tmp_path):
    folder = shutil.copytree(asked_to_end("plain"), tmp_path / "run")
    assert started.run(ENGINES["plain"], folder, run_inputs, *PLAIN)["codes"] != [0]
    said = folder.with_suffix(".log").read_text()
    assert "of a run that averages, and would lose its averages (averaging.rule=swa); set that" in said
    assert sorted(folder.glob("checkpoint-*/average"))


def test_the_best_is_chosen_anew_by_another_score(started, run_inputs, asked_to_end, tmp_path):
    folder = shutil.copytree(asked_to_end("plain", *PLAIN), tmp_path / "run")
    settings = (*PLAIN, "eval.metric_for_best_model=loss")
    assert started.run(ENGINES["plain"], folder, run_inputs, *settings)["codes"] == [0]
    assert "the choice of the best weights starts again from here" in folder.with_suffix(".log").read_text()
    assert '"metric": "loss"' in (folder / "summary.json").read_text()
