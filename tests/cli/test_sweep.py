from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swaft.cli import sweep
from swaft.cli.main import main
from swaft.errors import ConfigError, StateError

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(monkeypatch):
    """The lines that were launched; each run leaves scores, but those that are made to fail."""
    lines: list[list[str]] = []

    def launch(words: list[str], out: object) -> int:
        lines.append(words)
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if given["train.seed"] == "3":
            return 1
        write_scores(Path(given["train.output_dir"]), given)
        return 0

    monkeypatch.setattr(sweep, "launch", launch)
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
    assert main(["sweep", *words, "--set", "averaging.rule=none,swa,none"]) == 0
    assert [line[:3] for line in launched] == [["recipe.py", "--config", "a.yaml"]] * 4
    assert launched[0][3:] == [
        "averaging.rule=none", "train.seed=1", f"train.output_dir={tmp_path}/averaging.rule=none/seed-1",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "averaging.rule=swa, averaged: 0.765 ± 0.00707 (2 seeds)" in printed
    assert "averaging.rule=swa, averaged − averaging.rule=none, last: +0.05" in printed
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    "form", [["train.output_dir={}"], ["--train.output_dir={}"], ["--train.output_dir", "{}"]]
)
def test_the_folder_may_be_written_as_recipes_read_it(tmp_path, form):
    words = [word.format(tmp_path) for word in form]
    base, [run] = sweep.plan_runs(["recipe.py", *words, "--train.max_steps", "4"], [1], [])
    assert base == tmp_path
    assert run.words == [
        "recipe.py", "--train.max_steps", "4", "train.seed=1", f"train.output_dir={tmp_path}/seed-1"
    ]  # fmt: skip


@pytest.mark.parametrize("form", [["train.seed=7"], ["--train.seed", "7"]])
def test_a_seed_on_the_line_is_refused_because_every_run_gets_its_own(form):
    with pytest.raises(ConfigError, match=r"train\.seed is 7, but .*; remove it, and set --seeds"):
        sweep.plan_runs(["recipe.py", "train.output_dir=x", *form], [1, 2], [])


def test_a_value_in_double_quotes_may_hold_commas():
    name = "model.lora_target_modules"
    _, runs = sweep.plan_runs(["train.output_dir=x"], [1], [f'{name}="query,value",all-linear'])
    assert [run.words[0] for run in runs] == [f"{name}=query,value", f"{name}=all-linear"]


def test_a_folder_in_a_value_leads_nowhere(tmp_path):
    values = "data.train_file=../../../rows/a.csv,../../../rows/b.csv"
    base, runs = sweep.plan_runs([f"train.output_dir={tmp_path}"], [1], [values])
    assert [run.folder.parent.parent for run in runs] == [base, base]
    assert runs[0].folder.parent.name == "data.train_file=..--..--..--rows--a.csv"


def test_a_folder_that_cannot_be_is_an_error_that_says_so(tmp_path):
    with pytest.raises(StateError, match="File name too long"):
        sweep.run(["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "1", "--set", f"a.b={'x' * 300}"])


def test_a_score_that_one_run_lacks_is_compared_for_the_others(tmp_path):
    folders = [tmp_path / f"seed-{seed}" for seed in (1, 2, 3)]
    for seed, folder in enumerate(folders, start=1):
        write_scores(folder, {"train.seed": str(seed)})
    scores = {"last": {"accuracy": "nan"}, "averaged": {"accuracy": 0.76}}  # text, as JSON lacks the number
    (folders[0] / "summary.json").write_text(json.dumps({"scores": {"test": scores}}))
    (row, *_) = sweep.compare_runs(tmp_path, folders)
    assert row == "test accuracy     all runs, last: 0.725 ± 0.00707 (2 seeds)"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>accuracy</td>") == 3
    assert "<td>averaged − last (all runs)</td><td>2</td>" in page


def test_a_run_that_has_ended_is_left_alone(tmp_path, launched):
    words = ["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds"]
    assert main([*words, "1"]) == 0
    assert main([*words, "2"]) == 0
    assert [line[1] for line in launched] == ["train.seed=1", "train.seed=2"]


def test_a_run_that_another_sweep_ends_meanwhile_is_left_alone(tmp_path, launched, monkeypatch):
    words = ["recipe.py", f"train.output_dir={tmp_path}", "--seeds"]
    launch, others = sweep.launch, iter([lambda: sweep.run([*words, "2,1"])])

    def launch_beside(line: list[str], out: object) -> int:
        code = launch(line, out)
        next(others, lambda: 0)()  # it has begun with the run that is this one's second
        return code

    monkeypatch.setattr(sweep, "launch", launch_beside)
    assert sweep.run([*words, "1,2"]) == 0
    assert [line[1] for line in launched] == ["train.seed=1", "train.seed=2"]


def test_a_run_refused_because_another_sweep_was_in_it_counts_once_that_one_has_ended(
    tmp_path, launched, monkeypatch
):
    launch = sweep.launch

    def launch_refused(line: list[str], out: object) -> int:
        return launch(line, out) or 1  # the other sweep's run ends well, and this one's attempt is refused

    monkeypatch.setattr(sweep, "launch", launch_refused)
    assert sweep.run(["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "1,2"]) == 0
    assert len(launched) == 2


def test_a_folder_whose_run_ended_with_another_line_is_refused(tmp_path, launched):
    words = ["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "1"]
    sweep.run([*words, "train.learning_rate=1e-4"])
    refused = pytest.raises(ConfigError, match=r"seed-1 holds a run of recipe.py train.learning_rate=1e-4 ")
    with refused:
        sweep.run([*words, "train.learning_rate=1e-2"])
    (tmp_path / "seed-1" / "summary.json").unlink()  # interrupted, it would resume
    with refused:
        sweep.run([*words, "train.learning_rate=1e-2"])
    assert len(launched) == 1


def test_a_run_that_fails_is_named_and_the_others_are_run(tmp_path, launched, capsys):
    assert main(["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds", "3,4"]) == 1
    assert len(launched) == 2
    assert f"failed: {tmp_path}/seed-3" in capsys.readouterr().out


def test_the_runs_that_wait_become_an_array_job(tmp_path, launched, capsys):
    words = [
        "sweep",
        "--config_file",
        "a.yaml",
        "recipe.py",
        f"train.output_dir={tmp_path}/runs",
        "--seeds",
        "2",
    ]
    job = ["--slurm", str(tmp_path / "job.sbatch")]
    assert main([*words, *job, "data.delimiter=a b"]) == 0
    assert not launched
    assert "2 of 2 runs; sbatch" in capsys.readouterr().out
    assert main([*words, *job, "data.delimiter=a b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": job[1], "runs": 2}
    script = tmp_path / "launch" / "slurm" / "train.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text('printf "%s\\n" "$@"\n')
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", job[1]], env=environ, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == [
        "a.yaml", "recipe.py", "data.delimiter=a b", "train.seed=2", f"train.output_dir={tmp_path}/runs/seed-2"
    ]  # fmt: skip
    text = Path(job[1]).read_text()
    assert "#SBATCH --array=0-1\n" in text
    of_one_run = (ROOT / "launch" / "slurm" / "train.sbatch").read_text().splitlines()
    asked = [line for line in of_one_run if line.startswith("#SBATCH") and "job-name" not in line]
    assert asked
    assert {*asked} <= {*text.splitlines()}  # what the script of one run relies on


def test_a_sweep_whose_jobs_have_all_ended_is_compared_by_the_same_line(tmp_path, launched, capsys):
    words = ["sweep", "--config_file", "a.yaml", "recipe.py", f"train.output_dir={tmp_path}", "--seeds", "2"]
    assert main(words) == 0
    assert main([*words, "--slurm", str(tmp_path / "job.sbatch")]) == 0
    assert not (tmp_path / "job.sbatch").exists()
    assert capsys.readouterr().out.count("(2 seeds)") == 4


def test_a_run_is_asked_to_end_when_its_sweep_is_killed(tmp_path):
    run = tmp_path / "run.sh"
    run.write_text(
        f"#!/bin/bash\ntrap 'touch {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/started\n"
        "while true; do sleep 0.1; done\n"
    )
    run.chmod(0o755)
    script = f"import sys; from swaft.cli import sweep; sys.executable = {str(run)!r}; sweep.launch([], sys.stdout)"
    process = subprocess.Popen([sys.executable, "-c", script])
    for name in ("started", "saved"):
        deadline = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.05)
        process.kill()
    process.wait()


def test_a_sweep_that_is_interrupted_starts_no_other_run(tmp_path, monkeypatch, capsys):
    started = []

    def interrupt(words: list[str], out: object) -> None:
        started.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "launch", interrupt)
    assert main(["sweep", "recipe.py", f"train.output_dir={tmp_path}", "--seeds", "2"]) == 130
    assert len(started) == 1
    assert "the same line continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.py", "--seeds", "2"], "no folder for the runs"),
        (["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "rule=swa"], "names no setting"),
        (["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "averaging.rule="], "names no setting"),
        (["recipe.py", "train.output_dir=x"], "--seeds"),
        (
            ["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "a.b=1", "--set", "a.b=2"],
            "a setting twice",
        ),
        (
            ["recipe.py", "train.output_dir=/dev/null/x", "--seeds", "2"],
            "/dev/null/x cannot be made a folder",
        ),
        (["recipe.py", "train.output_dir=x", "--seeds", "many"], "was found, expected a number of seeds"),
        (["recipe.py", "train.output_dir=x", "--seeds", "0"], "was found, expected a number of seeds"),
        (["recipe.py", "train.output_dir=x", "--seeds", "1,1"], "was found, expected a number of seeds"),
        (["recipe.py", "train.output_dir=x", "--seeds", "2", "--set", "train.seed=1,2"], "names no setting"),
    ],
)
def test_a_line_that_names_no_runs_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        sweep.run(words)
    assert not list(tmp_path.iterdir())


def test_a_line_that_the_batch_script_does_not_take_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected --config_file FILE, the recipe"):
        sweep.run(
            ["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "2", "--slurm", str(tmp_path / "job")]
        )
    assert not (tmp_path / "job").exists()


def test_a_damaged_record_of_lines_is_refused_and_kept(tmp_path, launched):
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep.json is not JSON"):
        sweep.run(["recipe.py", f"train.output_dir={tmp_path}", "--seeds", "2"])
    assert (tmp_path / "sweep.json").read_text() == "{"
    assert not launched
