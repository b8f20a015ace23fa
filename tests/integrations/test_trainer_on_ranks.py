from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import faults, run_ranks, start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from user_scripts import RUNS, SAVED, STEPS, VARIANTS, write_inputs

import swaft
from swaft.cli.export import run as export

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]
HERE = Path(__file__).parent
SCRIPTS = [f"{name} zero{stage}" for name, stage in RUNS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def findings(folder):
    write_inputs(folder)
    _, output = run_ranks([HERE / "user_scripts.py", folder], timeout_s=180)
    assert "SIGKILL" in output, output[-6000:]
    return start_ranks(HERE / "trainer_worker.py", folder / "findings.json", timeout_s=400)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp2", "sft zero2"])
def test_a_trainer_averages_evaluates_resumes_and_trains_noise_on_two_ranks(findings, engine):
    assert not faults(findings, engine, checks=5)


def test_the_loss_of_noise_is_the_mean_over_rows_under_zero3(findings):
    assert not faults(findings, "zero3", checks=1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_in_the_form_of_transformers_examples_needs_two_added_lines(findings, script):
    assert not faults(findings, script, checks=4)


def averager_of(start: Path, masters: dict[int, dict[str, torch.Tensor]]) -> swaft.WeightAverager:
    """The library's averager in one process, fed what the ranks of a Trainer had as masters."""
    kind = (
        AutoModelForSequenceClassification if start.parent.name == "classification" else AutoModelForSeq2SeqLM
    )
    model = kind.from_pretrained(start, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0.5), total_steps=STEPS)
    for weights in masters.values():
        averager.wait()  # it may still read what the next lines overwrite
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        averager.step()
    return averager


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_averages_of_a_script_are_those_of_the_library_and_open_elsewhere(findings, folder, name, stage):
    runs = folder / name / f"zero{stage}"
    for variant, masters in torch.load(runs / "masters.pt").items():
        if not VARIANTS[variant]:
            continue
        run = runs / variant
        averager = averager_of(folder / name / "model", masters)
        averager.save_pretrained(runs / f"library-{variant}")
        expected = weights_of(runs / f"library-{variant}")
        assert same(expected, weights_of(run / "final-averaged"))

    # of the last variant: the checkpoint's averages as a folder, and under another engine
    saved = run / f"checkpoint-{STEPS}" / "averages"
    export([str(saved), "--base", str(folder / name / "model"), "--output", str(runs / "exported")])
    assert same(expected, weights_of(runs / "exported"))
    averager.load_state(run / f"checkpoint-{SAVED}" / "averages", same_weights=False)
    assert averager.num_averaged == 1
    averager.load_state(saved)
    averager.save_pretrained(runs / "opened")
    assert same(expected, weights_of(runs / "opened"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights by name; under ZeRO-3 transformers 5.23 writes BERT's under the names that TensorFlow gave them."""
    weights = load_file(folder / "model.safetensors")
    return {re.sub("gamma$", "weight", re.sub("beta$", "bias", name)): weights[name] for name in weights}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
