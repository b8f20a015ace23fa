from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swaft.cli.average import run
from swaft.cli.main import main
from swaft.errors import ConfigError, StateError

pytestmark = pytest.mark.unit


@pytest.fixture
def checkpoints(tmp_path):
    paths = []
    for step in (1, 2, 10):
        path = tmp_path / "run" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        save_file({"w": torch.full([4], float(step))}, path / "model.safetensors")
        paths.append(str(path))
    return paths


def written(path):
    return load_file(path / "model.safetensors")["w"]


def test_checkpoints_are_averaged_and_the_hash_is_printed(tmp_path, checkpoints, capsys):
    assert run([*checkpoints[:2], "--output", str(tmp_path / "out")]) == 0
    assert torch.equal(written(tmp_path / "out"), torch.full([4], 1.5))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(lines["sha256"]) == 64
    assert lines["weights"] == "4 in 1 tensors, float32"


def test_the_last_checkpoints_of_a_run_are_averaged(tmp_path, checkpoints):
    run([str(tmp_path / "run"), "--last", "2", "--output", str(tmp_path / "out")])
    assert torch.equal(written(tmp_path / "out"), torch.full([4], 6.0))


def test_weights_type_and_size_of_files_are_as_asked_for(tmp_path, checkpoints, capsys):
    words = ["--weights", "0.25,0.75", "--dtype", "bfloat16", "--max-shard-size", "1KB", "--json"]
    run([*checkpoints[:2], *words, "--output", str(tmp_path / "out")])
    told = json.loads(capsys.readouterr().out)
    assert told["shares"] == [[checkpoints[0], 0.25], [checkpoints[1], 0.75]]
    assert told["dtype"] == "bfloat16"
    assert written(tmp_path / "out").dtype == torch.bfloat16


SCORE = (
    "import sys; from safetensors.numpy import load_file; "
    'print(-abs(float(load_file(sys.argv[1] + "/model.safetensors")["w"][0]) - 1.6))'
)


def test_the_greedy_soup_keeps_what_helps(tmp_path, checkpoints, capsys):
    command = f"{sys.executable} -c '{SCORE}' {{folder}}"
    words = ["--evaluate", command, "--higher-is-better", "--json", "--output", str(tmp_path / "out")]
    run([*checkpoints, *words])
    told = json.loads(capsys.readouterr().out)
    assert torch.equal(written(tmp_path / "out"), torch.full([4], 1.5))
    assert [trial["kept"] for trial in told["greedy"]["trials"]] == [True, False]
    assert told["greedy"]["score"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "--output"),
        (["--output", "x"], "checkpoints"),
        (["a", "b", "--last", "2", "--output", "x"], "--last takes one run folder; found 2"),
        (
            ["a", "--last", "0", "--output", "x"],
            "--last: '0' was found, expected a whole number of at least 1",
        ),
        (
            ["a", "--weights", "0.2,x", "--output", "x"],
            "--weights: '0.2,x' was found, expected numbers separated by commas",
        ),
        (
            ["a", "--max-shard-size", "5 parsecs", "--output", "x"],
            "'5 parsecs' was found, expected a size such as 500MB",
        ),
        (["a", "--evaluate", "c {folder}", "--output", "x"], "goes with --higher-is-better or --lower"),
        (["a", "--lower-is-better", "--output", "x"], "goes with --higher-is-better or --lower"),
        (["a", "--evaluate", "c", "--lower-is-better", "--output", "x"], r"with \{folder\} in it"),
        (
            ["a", "--evaluate", "c {folder}", "--weights", "1", "--lower-is-better", "--output", "x"],
            "without --weights",
        ),
        (["a", "--dtype", "int8", "--output", "x"], "--dtype: invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        run(words)


def test_an_output_that_is_there_is_refused(checkpoints):
    with pytest.raises(
        StateError, match=r"is there already; nothing was changed in it. Name a new folder as --output"
    ):
        run([*checkpoints, "--output", checkpoints[0]])


def looping(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "shard.safetensors"}}')
    (path / "shard.safetensors").symlink_to("shard.safetensors")


def nested(path):
    (path / "config.json").write_text('{"a":' * 100_000)


@pytest.mark.parametrize("output", [".", "", "x" * 300, "a\0b"])
def test_an_output_that_cannot_be_is_one_error_and_no_traceback(
    tmp_path, checkpoints, capsys, monkeypatch, output
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["average", checkpoints[0], "--output", output]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", ["average", "export"])
@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_a_checkpoint_that_cannot_be_is_one_error_and_no_traceback(checkpoints, capsys, command, path):
    for words in ([path, "--base", checkpoints[0]], [checkpoints[0], "--base", path]):
        assert main([command, *words, "--output", "unused"]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_of_somebody_else_is_one_error_and_no_traceback(checkpoints, capsys, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert main(["average", *checkpoints, "--output", "unused"]) == 1
    assert capsys.readouterr().err == f"error: {checkpoints[0]} could not be looked into: Permission denied\n"


def test_a_base_named_as_on_the_hub_is_no_folder(checkpoints, capsys):
    assert main(["average", *checkpoints, "--base", "google/t5-small", "--output", "unused"]) == 1
    assert "google/t5-small is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [looping, nested])
def test_a_checkpoint_that_cannot_be_read_is_one_error_and_no_traceback(
    tmp_path, checkpoints, capsys, damage
):
    damage(tmp_path / "run" / "checkpoint-1")
    assert main(["average", *checkpoints, "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
