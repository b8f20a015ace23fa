"""`swaft report --surface`, on small runs of every recipe."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, load_recipe
from safetensors.torch import load_file
from torch import nn

from swaft.cli.main import main
from swaft.errors import ConfigError
from swaft.report.landscape import LINE, loss_surface
from swaft.report.runs import read_run

FEW = ("train.max_steps=8", "averaging.rule=swa")
CAUSAL = (
    *("--config", str(ROOT / "recipes/configs/causal_lm/smoke.yaml"), "data.max_train_samples=64"),
    *("data.max_eval_samples=16", "data.max_predict_samples=8", "data.max_length=64"),
)


def finished(name: str, folder: Path, *words: str) -> Path:
    assert load_recipe(name).main([*words, *FEW, f"train.output_dir={folder}"]) == 0
    return folder


def losses_of(run: Path) -> list[float]:
    scores = json.loads((run / "summary.json").read_text())["scores"]["validation"]
    return [scores[weights]["loss"] for weights in ("last", "averaged")]


@pytest.mark.recipe
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("classification", ("eval.eval_steps=2",)),
        ("classification", ("model.use_peft=true", "model.lora_r=4", "model.lora_target_modules=all-linear")),
        ("question_answering", ()),
        ("seq2seq", ("eval.num_beams=null",)),
        ("causal_lm", ()),
    ],
    ids=["classification", "adapters", "question answering", "text generation", "causal lm"],
)
def test_the_ends_of_the_line_are_the_losses_that_the_run_found(recipe, words, request, tmp_path):
    inputs = {"classification": "inputs", "question_answering": "question_inputs", "seq2seq": "text_inputs"}
    config = CAUSAL
    if recipe in inputs:
        config = ("--config", str(request.getfixturevalue(inputs[recipe]) / "run.yaml"))
    run = finished(recipe, tmp_path / "run", *config, *words)
    assert main(["report", "--surface", str(run)]) == 0
    line = json.loads((run / "surface.json").read_text())["line"]
    at = dict(zip(line["position"], line["loss"], strict=True))
    last, averaged = losses_of(run)
    assert [at[0], at[1]] == pytest.approx([last, averaged], rel=1e-5)
    assert last != pytest.approx(averaged, rel=1e-4)
    assert "Loss around both" in (run / "report.html").read_text()


@pytest.mark.recipe
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_drift_that_is_logged_is_the_distance_of_the_saved_weights(inputs, tmp_path):
    run = finished(
        "classification", tmp_path / "run", "--config", str(inputs / "run.yaml"), "eval.eval_steps=2"
    )
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    drifts = {each["step"]: each["drift"] for each in records if each["kind"] == "validation/averaged"}
    last, averaged = (load_file(run / name / "model.safetensors") for name in ("final", "final-averaged"))
    apart = torch.cat([(averaged[name].double() - last[name].double()).flatten() for name in last]).norm()
    assert sorted(drifts) == [4, 6, 8]
    assert drifts[8] == pytest.approx(apart.item(), rel=1e-9)
    assert 0 < drifts[6] < drifts[8]
    assert read_run(run).training["drift"] == sorted(drifts.items())


def bowl() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(40, 30), nn.Linear(40, 30)


@pytest.mark.unit
def test_a_bowl_around_the_average_is_seen_as_one():
    last, averaged = bowl()
    before, mean = last.weight.detach().clone(), averaged.weight.detach().clone()
    last.bias.data.copy_(averaged.bias)  # a tensor that has not moved is left alone
    found = loss_surface(last, averaged, lambda: (last.weight - mean).double().square().sum().item())
    square = (before - mean).double().square().sum().item()
    line, plane = found["line"], found["plane"]
    assert line["loss"] == pytest.approx([square * (1 - place) ** 2 for place in line["position"]], rel=1e-5)
    assert line["loss"][line["position"].index(1)] == 0
    across, up = np.array(plane["across"]), np.array(plane["up"])[:, None]
    assert np.array(plane["loss"]) == pytest.approx(square * ((1 - across) ** 2 + up**2), rel=1e-5)
    assert torch.equal(last.weight, before)


@pytest.mark.unit
def test_one_autocast_around_a_surface_changes_nothing_of_it():
    last, averaged = bowl()
    rows = torch.randn(8, 40)

    def loss() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return last(rows).float().square().mean().item()

    expected = loss_surface(last, averaged, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_surface(last, averaged, loss) == expected
        assert loss() == expected["line"]["loss"][LINE.index(0)]


@pytest.mark.unit
def test_between_equal_weights_there_is_no_line():
    last, _ = bowl()
    with pytest.raises(ConfigError, match="the same bit for bit"):
        loss_surface(last, copy.deepcopy(last), lambda: 0.0)


def without(name: str):
    return lambda run: shutil.rmtree(run / name)


def of_another_class(run: Path) -> None:
    path = run / "final" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForTokenClassification"]})
    )


@pytest.mark.unit
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("final-averaged"), "has no final-averaged/, which --surface needs: it averaged nothing"),
        (without("final"), "has no final/, which --surface needs: it has not ended"),
        (lambda run: (run / "config.yaml").unlink(), "has no config.yaml with settings of a recipe"),
        (
            lambda run: (run / "config.yaml").write_text("train: {output_dir: x, of_old: 1}\n"),
            "train.of_old: no such setting",
        ),
        (lambda run: (run / "config.yaml").write_text("train: {"), "config.yaml is not YAML"),
        (lambda run: (run / "final" / "model.safetensors").unlink(), "final cannot be loaded"),
        (of_another_class, "has a BertForTokenClassification, but --surface scores a BertForSequenceClass"),
    ],
    ids=[
        *("nothing averaged", "not ended", "no settings", "older version", "broken settings", "no weights"),
        "another class",
    ],
)
def test_a_run_without_what_a_surface_needs_is_refused_and_left_alone(
    damage, message, inputs, tmp_path, capsys
):
    run = tmp_path / "run"
    for name in ("final", "final-averaged"):
        shutil.copytree(inputs / "model", run / name)
    (run / "metrics.jsonl").write_text("")
    files = {name: str(inputs / f"{name}.csv") for name in ("train", "validation")}
    rows = "".join(f"  {name}_file: {file}\n" for name, file in files.items())
    (run / "config.yaml").write_text(
        f"model: {{model_name_or_path: {inputs / 'model'}}}\ntrain: {{output_dir: {run}}}\ndata:\n{rows}"
    )
    damage(run)
    before = sorted(run.rglob("*"))
    assert main(["report", "--surface", str(run)]) == 1
    assert message in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
