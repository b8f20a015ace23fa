"""Averages that a run has saved, exported by `swaft export` with the bits that the run itself would export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import swaft
from swaft.cli.average import run as average
from swaft.cli.export import run
from swaft.distributed import Ranks
from swaft.errors import ConfigError, StateError
from swaft.training.run.checkpoints import save_checkpoint

pytestmark = pytest.mark.unit


@pytest.fixture
def averager():
    return trained(0)


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = {"mean": swaft.SWA(start=0), "recent": swaft.EMA(decay=0.5)}
    averager = swaft.WeightAverager(model, optimizer, rule=rules, total_steps=6)
    more_steps(averager, 4)
    return averager


def more_steps(averager, count):
    optimizer = averager.engine.inner_optimizer
    for _ in range(count):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averager.step()


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "linear"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {"weight": torch.ones(3, 5), "bias": torch.ones(3), "frozen": torch.ones(2)},
        folder / "model.safetensors",
    )
    return str(folder)


@pytest.fixture
def run_folder(tmp_path, averager):
    def write(folder):
        averager.save_state(folder / "average")
        return {}

    for step in (2, 4):
        save_checkpoint(Ranks(), tmp_path / "run", step, write=write, content={})
    return tmp_path / "run"


@pytest.mark.parametrize("named", ["", "checkpoint-4", "checkpoint-4/average"])
@pytest.mark.parametrize("rule", ["mean", "recent"])
def test_an_export_has_the_bits_of_the_runs_own(tmp_path, averager, base, run_folder, named, rule, capsys):
    averager.save_pretrained(tmp_path / "own", rule)
    words = [str(run_folder / named), "--base", base, "--rule", rule, "--output", str(tmp_path / "out")]
    assert run(words) == 0
    own, found = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        **{name: tensor.tolist() for name, tensor in own.items()},
        "frozen": [1.0, 1.0],
    }
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "sha256" in capsys.readouterr().out


@pytest.fixture
def finished_run(run_folder, averager, base):
    """The run, two steps on from its last checkpoint, at its end."""
    more_steps(averager, 2)
    averager.save_pretrained(run_folder / "final-averaged", "mean")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(Path(base) / name, run_folder / "final-averaged")
    (run_folder / "summary.json").write_text('{"steps": 7, "applied_steps": 6}')
    return run_folder


@pytest.mark.parametrize("with_base", [True, False])
def test_of_a_finished_run_the_final_average_is_exported_and_the_step_is_printed(
    tmp_path, base, finished_run, with_base, capsys
):
    words = [str(finished_run), "--output", str(tmp_path / "out"), "--json"]
    assert run([*words, "--base", base] if with_base else words) == 0
    assert json.loads(capsys.readouterr().out)["applied_steps"] == 6
    own, found = (
        load_file(each / "model.safetensors") for each in (finished_run / "final-averaged", tmp_path / "out")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_checkpoint_of_a_finished_run_is_exported_where_it_is_named(tmp_path, base, finished_run, capsys):
    words = ["--base", base, "--rule", "mean", "--output", str(tmp_path / "out")]
    assert run([str(finished_run / "checkpoint-4"), *words]) == 0
    assert "after optimizer step 4\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--rule mean: .*averaged is the one average of"):
        run([str(finished_run), *words])


def test_an_export_in_16_bits_tells_what_rounding_moved(tmp_path, base, run_folder, capsys):
    words = [
        "--base",
        base,
        "--rule",
        "mean",
        "--dtype",
        "bfloat16",
        "--json",
        "--output",
        str(tmp_path / "out"),
    ]
    run([str(run_folder), *words])
    told = json.loads(capsys.readouterr().out)
    assert 1e-4 < told["rounding"] < 4e-3
    assert load_file(tmp_path / "out" / "model.safetensors")["weight"].dtype == torch.bfloat16


def test_a_damaged_state_is_named_and_nothing_is_written(tmp_path, base, run_folder):
    (file,) = (run_folder / "checkpoint-4" / "average").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StateError, match=f"{file.name} is damaged"):
        run([str(run_folder), "--base", base, "--rule", "mean", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "named"),
    [(run, ""), (run, "checkpoint-4"), (run, "checkpoint-4/average"), (average, "checkpoint-4/average")],
)
def test_averages_of_another_run_put_into_a_checkpoint_are_refused(
    tmp_path, base, run_folder, command, named
):
    shutil.rmtree(run_folder / "checkpoint-4" / "average")
    trained(1).save_state(run_folder / "checkpoint-4" / "average")
    words = [str(run_folder / named), "--base", base, "--rule", "mean", "--output", str(tmp_path / "out")]
    with pytest.raises(
        StateError, match=r"average/manifest.json is not the one that .*checkpoint-4/manifest"
    ):
        command(words)
    assert not (tmp_path / "out").exists()


def test_averages_put_into_a_checkpoint_that_had_none_are_refused(tmp_path, averager, base):
    save_checkpoint(Ranks(), tmp_path / "other", 4, write=lambda folder: {}, content={})
    averager.save_state(tmp_path / "other" / "checkpoint-4" / "average")
    words = [str(tmp_path / "other"), "--base", base, "--rule", "mean", "--output", str(tmp_path / "out")]
    with pytest.raises(StateError, match=r"average is not among what .*checkpoint-4 was written with"):
        run(words)


@pytest.mark.parametrize("lost", [["manifest.json"], ["COMPLETE"], ["manifest.json", "COMPLETE"]])
@pytest.mark.parametrize("command", [run, average])
def test_averages_in_a_checkpoint_that_has_lost_its_marks_are_refused(
    tmp_path, base, run_folder, command, lost
):
    checkpoint = run_folder / "checkpoint-4"
    (checkpoint / "rank-00000.safetensors").write_bytes(b"")  # as every rank of a run leaves
    for name in lost:
        (checkpoint / name).unlink()
    words = ["--base", base, "--rule", "mean", "--output", str(tmp_path / "out")]
    with pytest.raises(StateError, match=r"checkpoint-4.*(is missing|is not complete)"):
        command([str(checkpoint / "average"), *words])
    assert not (tmp_path / "out").exists()


def test_averages_that_lie_by_themselves_are_exported(tmp_path, averager, base):
    averager.save_state(tmp_path / "step-4" / "average")
    words = ["--base", base, "--rule", "mean", "--output", str(tmp_path / "out")]
    assert run([str(tmp_path / "step-4" / "average"), *words]) == 0


@pytest.mark.parametrize("named", ["checkpoint-4", "checkpoint-4/averages"])
def test_a_checkpoint_of_the_trainer_is_its_own_base(named, tmp_path, averager, base):
    checkpoint = shutil.copytree(base, tmp_path / "checkpoint-4")
    averager.save_state(checkpoint / "averages")
    averager.save_pretrained(tmp_path / "own", "mean")
    assert run([str(tmp_path / named), "--output", str(tmp_path / "out"), "--rule", "mean"]) == 0
    own, found = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert torch.equal(found["weight"], own["weight"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_checkpoint_of_accelerate_needs_a_base_though_it_holds_weights(tmp_path, averager, base):
    averager.save_state(tmp_path / "checkpoint" / "averages")
    shutil.copy(Path(base) / "model.safetensors", tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="--base is missing"):
        run([str(tmp_path / "checkpoint"), "--output", str(tmp_path / "out"), "--rule", "mean"])


def test_where_there_are_no_averages_that_is_said(tmp_path, base):
    with pytest.raises(ConfigError, match=r"base holds no averages; expected a state"):
        run([base, "--base", base, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(("words", "problem"), [(["--output", "x"], "--base"), (["--base", "x"], "--output")])
def test_options_that_are_missing_are_named(run_folder, words, problem):
    with pytest.raises(ConfigError, match=f"swaft export: .*{problem}.*--help lists the options"):
        run([str(run_folder), *words])
