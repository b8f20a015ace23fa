from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from swaft.cli import sweep
from swaft.cli.main import main
from swaft.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def launched(monkeypatch):
    """The lines that were launched; each run leaves scores, but those that are made to fail."""
    lines: list[list[str]] = []

    def launch(command: list[str], stdout: object) -> subprocess.CompletedProcess[bytes]:
        assert command[1:3] == ["-m", "accelerate.commands.launch"]
        words = command[3:]
        lines.append(words)
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if given["train.seed"] == "3":
            return subprocess.CompletedProcess(command, 1)
        write_scores(Path(given["train.output_dir"]), given)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", launch)
    return lines


def write_scores(folder: Path, given: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    rule = given.get("averaging.rule", "swa")
    (folder / "config.yaml").write_text(
        f"train:\n  seed: {given['train.seed']}\naveraging:\n  rule: {rule}\n"
    )
    score = 0.7 + 0.01 * int(given["train.seed"])
    scores = {"last": {"accuracy": score}} | (
        {"averaged": {"accuracy": score + 0.05}} if rule == "swa" else {}
    )
    (folder / "summary.json").write_text(json.dumps({"metric": "accuracy", "scores": {"test": scores}}))


def test_every_combination_runs_with_every_seed_and_is_compared_at_the_end(tmp_path, launched, capsys):
    words = ["recipe.py", "--config", "a.yaml", f"train.output_dir={tmp_path}", "--seeds", "2"]
    assert main(["sweep", *words, "--set", "averaging.rule=none,swa"]) == 0
    assert [line[:3] for line in launched] == [["recipe.py", "--config", "a.yaml"]] * 4
    assert launched[0][3:] == [
        "averaging.rule=none", "train.seed=1", f"train.output_dir={tmp_path}/averaging.rule=none/seed-1",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "averaging.rule=swa, averaged: 0.765 ± 0.00707 (2 seeds)" in printed
    assert "averaging.rule=swa − averaging.rule=none: +0.05" in printed
    assert (tmp_path / "report.html").is_file()


def test_a_run_that_has_ended_is_left_alone(tmp_path, launched):
    words = ["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds"]
    assert main([*words, "1"]) == 0
    assert main([*words, "2"]) == 0
    assert [line[1] for line in launched] == ["train.seed=1", "train.seed=2"]


def test_a_folder_whose_run_ended_with_another_line_is_refused(tmp_path, launched):
    words = ["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "1"]
    sweep.run([*words, "train.learning_rate=1e-4"])
    with pytest.raises(ConfigError, match=r"seed-1 holds a run of recipe.py train.learning_rate=1e-4 "):
        sweep.run([*words, "train.learning_rate=1e-2"])
    assert len(launched) == 1


def test_a_run_that_fails_is_named_and_the_others_are_run(tmp_path, launched, capsys):
    assert main(["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds", "3,4"]) == 1
    assert len(launched) == 2
    assert f"failed: {tmp_path}/seed-3" in capsys.readouterr().out


def test_the_runs_that_wait_become_an_array_job(tmp_path, launched):
    words = ["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds", "2"]
    assert main([*words, "--slurm", str(tmp_path / "job.sbatch")]) == 0
    job = (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1" in job
    assert f"1) accelerate launch recipe.py train.seed=2 train.output_dir={tmp_path}/seed-2 ;;" in job
    assert not launched
    assert os.system(f"bash -n {tmp_path}/job.sbatch") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.py", "--seeds", "2"], "no folder for the runs"),
        (["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "rule=swa"], "names no setting"),
        (["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "averaging.rule="], "names no setting"),
        (["recipe.py", "train.output_dir=x"], "--seeds"),
        (["recipe.py", "train.output_dir=x", "--seeds", "many"], "invalid"),
    ],
)
def test_a_line_that_names_no_runs_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        sweep.run(words)
