from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from tiny_inputs import accuracy_of, save_model

from swaft.training.config import load_config
from swaft.training.data.classification import ClassificationConfig

pytestmark = pytest.mark.recipe

RECIPE = "recipes/classification.py"


def run(inputs: Path, launcher: str, output: Path, *overrides: str):
    return launch(
        launcher, RECIPE, "--config", str(inputs / "run.yaml"), f"train.output_dir={output}", *overrides
    )


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def values(records: list[dict], name: str) -> list[float]:
    return [record[name] for record in records]


def test_one_process_trains_evaluates_and_saves_both_weights(inputs, tmp_path):
    output = tmp_path / "run"
    finished = run(inputs, "single.yaml", output, "noise.kind=r3f")
    assert finished.code == 0, finished.err
    assert {entry.name for entry in output.iterdir()} == {
        "command.txt",
        "config.yaml",
        "env.json",
        "final",
        "final-averaged",
        "metrics.jsonl",
        "summary.json",
    }

    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == summary["applied_steps"] == 54  # 18 micro-batches, 2 a step, 6 epochs
    assert summary["num_averaged"] == 28  # steps 27 to 54
    assert set(summary["scores"]) == {"validation", "test"}
    assert summary["scores"]["validation"]["last"]["accuracy"] == 1.0  # the label is one word of the sentence
    for split in ("validation", "test"):
        for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
            score = summary["scores"][split][weights]["accuracy"]
            assert score == pytest.approx(accuracy_of(output / folder, inputs / f"{split}.csv"))
    last, averaged = (load_file(output / name / "model.safetensors") for name in ("final", "final-averaged"))
    assert not torch.equal(last["classifier.weight"], averaged["classifier.weight"])

    assert [record["step"] for record in records(output, "train")] == list(range(3, 55, 3))
    assert [record["step"] for record in records(output, "validation/last")] == [10, 20, 30, 40, 50, 54]
    assert [record["step"] for record in records(output, "validation/averaged")] == [30, 40, 50, 54]
    rates = [record["learning_rate"] for record in records(output, "train")]
    assert rates[1:] == [5e-3] * (len(rates) - 1)  # constant after warmup, because weights are averaged
    assert all(record["divergence"] > 0 for record in records(output, "train"))

    assert "Total optimization steps = 54" in finished.out
    assert (
        "Objective = r3f, uniform 1e-05 on the embeddings, weight 1 -> 2 forwards per micro" in finished.out
    )
    assert "step 54/54 | loss " in finished.out
    assert "%|" not in finished.out + finished.err  # no progress bar where there is no terminal
    config = load_config(ClassificationConfig, ["--config", str(output / "config.yaml")])
    assert config.noise.kind == "r3f"


@pytest.mark.slow
def test_the_window_and_the_blend_are_chosen_after_training_by_the_validation_score(inputs, tmp_path):
    output = tmp_path / "run"
    finished = run(
        inputs,
        "single.yaml",
        output,
        *("averaging.rule=windows", "averaging.start=0", "averaging.blocks=5", "averaging.search_blend=true"),
    )
    assert finished.code == 0, finished.err
    summary = json.loads((output / "summary.json").read_text())
    tried = summary["windows_tried"]
    assert len(tried) >= 5
    assert {window["start"] for window in tried} == {0, 11, 22, 33, 44}
    assert {window["blend"] for window in tried} == {0.0, 0.3, 0.6, 1.0, 1.5}
    assert "choosing the window and the blend of the average by accuracy on validation data" in finished.out
    if summary["window"]["blend"]:
        assert f"best of {len(tried)} windows and blends on validation data (accuracy " in finished.out
    best = max(window["score"] for window in tried)
    assert summary["scores"]["validation"]["averaged"]["accuracy"] == best
    assert summary["window"]["members"] == summary["window"]["end"] - summary["window"]["start"] + 1
    score = accuracy_of(output / "final-averaged", inputs / "test.csv")
    assert summary["scores"]["test"]["averaged"]["accuracy"] == pytest.approx(score)


@pytest.fixture(scope="module")
def ddp_and_zero3(inputs, tmp_path_factory) -> dict[str, Path]:
    outputs = {}
    for launcher in ("ddp_cpu.yaml", "zero3_cpu.yaml"):
        outputs[launcher] = tmp_path_factory.mktemp("runs") / "run"
        # Decay strong enough that a run which loses it on the way trains visibly differently.
        finished = run(inputs, launcher, outputs[launcher], "train.weight_decay=1.0")
        assert finished.code == 0, finished.err
        saved = load_file(outputs[launcher] / "final" / "model.safetensors")
        num_parameters = sum(weight.numel() for weight in saved.values())
        assert f"Number of trainable parameters = {num_parameters:,}" in finished.out
    return outputs


def test_zero3_on_two_ranks_trains_as_ddp_does(ddp_and_zero3):
    ddp, zero3 = (records(output, "train") for output in ddp_and_zero3.values())
    assert values(ddp, "step") == values(zero3, "step")
    assert values(ddp, "learning_rate") == values(zero3, "learning_rate")
    # Sums come in another order, and AdamW makes steps of full size out of rounding where a true gradient is
    # zero (the biases of attention keys): equal at first, close to the end.
    for name in ("loss", "grad_norm"):
        assert ddp[0][name] == pytest.approx(zero3[0][name], rel=1e-5)
        assert values(ddp, name) == pytest.approx(values(zero3, name), rel=0.02)


def test_zero3_scores_every_row_once_although_ranks_and_batches_do_not_divide_them(ddp_and_zero3, inputs):
    output = ddp_and_zero3["zero3_cpu.yaml"]
    summary = json.loads((output / "summary.json").read_text())
    for split in ("validation", "test"):
        for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
            expected = accuracy_of(output / folder, inputs / f"{split}.csv")
            assert summary["scores"][split][weights]["accuracy"] == pytest.approx(expected)


def test_zero3_leaves_the_deepspeed_configuration_it_ran_with(ddp_and_zero3):
    output = ddp_and_zero3["zero3_cpu.yaml"]
    config = json.loads((output / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert config["train_batch_size"] == 16
    assert config["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(config)
    assert "zero3_cpu.yaml" in (output / "command.txt").read_text()  # what repeats the run, ranks and all
    env = json.loads((output / "env.json").read_text())
    assert (env["world_size"], env["engine"]) == (2, "deepspeed-zero3")


def test_a_loss_that_is_nan_on_one_rank_ends_every_rank_with_one_message(inputs, tmp_path):
    poisoned = save_model(tmp_path / "model", nan_word="awful")  # only some rows hold the word
    finished = run(
        inputs,
        "zero3_cpu.yaml",
        tmp_path / "run",
        f"model.model_name_or_path={poisoned}",
        "averaging.rule=none",
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1",
    )
    assert finished.code != 0
    told = [line for line in finished.err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "is not finite" in told[0]
    assert "swaft.errors" not in finished.err  # no traceback of ours
    assert not (tmp_path / "run" / "summary.json").exists()
