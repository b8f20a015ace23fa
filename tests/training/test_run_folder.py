from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import torch

from swaft.distributed import shared_ranks
from swaft.errors import ConfigError
from swaft.training.config import load_config, to_yaml
from swaft.training.data.classification import ClassificationConfig
from swaft.training.run.checkpoints import save_checkpoint
from swaft.training.run.folder import RunFolder, environment

pytestmark = pytest.mark.unit

OLDER_CONFIG = Path(__file__).parent / "older_config.yaml"


@pytest.fixture
def folder(make_accelerator, tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "one", make_accelerator())


def test_a_new_folder_is_made_with_its_parents(folder):
    assert folder.path.is_dir()
    assert (folder.final.name, folder.final_averaged.name) == ("final", "final-averaged")


def test_an_empty_folder_may_be_used(make_accelerator, tmp_path):
    assert RunFolder.create(tmp_path, make_accelerator()).path == tmp_path


def test_a_folder_that_holds_anything_is_refused_and_left_alone(make_accelerator, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"train\.output_dir: .* holds another run already \(summary\.json\)"
    ):
        RunFolder.create(tmp_path, make_accelerator())
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_path_that_cannot_be_a_folder_is_refused(make_accelerator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.output_dir"):
        RunFolder.create(tmp_path / "file", make_accelerator())


def test_metrics_are_appended_one_json_object_a_line(folder):
    folder.append_metrics({"step": 1, "loss": torch.tensor(0.5)})
    folder.append_metrics({"step": 2, "loss": float("inf")})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": "inf"}]


def test_json_is_replaced_whole_and_leaves_no_half_file(folder):
    folder.write_json("summary.json", {"scores": {"last": {"loss": 1.0}}})
    folder.write_json("summary.json", {"scores": {}})
    assert json.loads((folder.path / "summary.json").read_text()) == {"scores": {}}
    assert [name for entry in folder.path.iterdir() if (name := entry.name) != ".lock"] == ["summary.json"]


def test_a_command_with_a_path_of_any_bytes_is_written_byte_by_byte(folder):
    folder.write_text("command.txt", os.fsdecode(b"train --output /data/\xff\n"))
    assert (folder.path / "command.txt").read_bytes() == b"train --output /data/\xff\n"


def test_other_ranks_write_nothing(tmp_path):
    other = RunFolder(Path(tmp_path), is_main=False)
    other.write_json("summary.json", {})
    other.append_metrics({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_provenance_holds_configuration_command_and_versions(folder, make_accelerator):
    folder.begin("train: {}\n", make_accelerator(), engine="plain")
    written = {entry.name for entry in folder.path.iterdir()}
    assert written - {".lock"} == {
        "config.yaml",
        "command.txt",
        "env.json",
    }  # ds_config.json only under DeepSpeed
    env = json.loads((folder.path / "env.json").read_text())
    assert env["packages"]["torch"] == metadata.version("torch")
    assert (env["world_size"], env["engine"], env["device"]) == (1, "plain", "cpu")


def test_the_environment_is_plain_json(make_accelerator):
    json.dumps(environment(make_accelerator(), engine="plain"), allow_nan=False)


def made(path: Path, *names: str) -> Path:
    """A run folder that holds these: files, or folders where the name ends in a slash."""
    for name in names:
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if name.endswith("/") else place.write_text("train: {}\n")
    return path


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_anew(make_accelerator, tmp_path):
    made(tmp_path, "config.yaml", "metrics.jsonl", "best/", "env.json.tmp", "checkpoint-5/")
    folder = RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml="train: {}\n")
    assert folder.checkpoint is None
    assert (tmp_path / "best").exists()  # for the run may still be refused
    folder.begin("train: {}\n", make_accelerator(), engine="plain")
    assert not {"metrics.jsonl", "best"} & {entry.name for entry in tmp_path.iterdir()}


def test_final_weights_of_a_run_that_was_ended_before_its_summary_are_written_anew(
    make_accelerator, tmp_path
):
    made(tmp_path, "config.yaml", "metrics.jsonl", "final/", "final-averaged/", "best/")
    save_checkpoint(shared_ranks(), tmp_path, 5, write=lambda path: {}, content={})
    folder = RunFolder.create(tmp_path, make_accelerator(), resume="auto")
    folder.begin("train: {}\n", make_accelerator(), engine="plain")
    there = {entry.name for entry in tmp_path.iterdir()}
    assert not {"final", "final-averaged"} & there
    assert {"best", "metrics.jsonl", "checkpoint-5"} <= there


def test_what_was_killed_before_it_had_written_anything_is_an_empty_folder(make_accelerator, tmp_path):
    made(tmp_path, "config.yaml.tmp", ".lock")
    assert RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml="x").checkpoint is None


def test_another_run_that_was_ended_is_left_alone(make_accelerator, tmp_path):
    made(tmp_path, "config.yaml", "metrics.jsonl")
    with pytest.raises(ConfigError, match="holds another run already"):
        RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml="train: {seed: 1}\n")
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_run_without_a_checkpoint_and_with_an_older_config_is_refused_in_one_line(
    make_accelerator, tmp_path
):
    # Its settings are still known; one of them was written though nothing used it.
    config = load_config(ClassificationConfig, ["--config", str(OLDER_CONFIG), "averaging.start=null"])
    made(tmp_path, "metrics.jsonl")
    shutil.copy(OLDER_CONFIG, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="holds another run already") as caught:
        RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml=to_yaml(config))
    [problem] = caught.value.problems
    assert "\n" not in problem
    assert problem.endswith("nothing was changed there. Name a new folder")


def test_checkpoints_of_another_run_that_were_never_finished_are_told(make_accelerator, tmp_path):
    made(tmp_path, "config.yaml")
    (tmp_path / "checkpoint-40").mkdir()
    with pytest.raises(
        ConfigError, match=r"No checkpoint there can be resumed from: checkpoint-40 never got"
    ):
        RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml="train: {seed: 1}\n")


def test_a_run_that_has_come_to_its_end_is_not_trained_in_again(make_accelerator, tmp_path):
    made(tmp_path, "config.yaml", "summary.json")
    with pytest.raises(ConfigError, match="holds a run that has finished"):
        RunFolder.create(tmp_path, make_accelerator(), resume="auto", config_yaml="train: {}\n")


@pytest.mark.parametrize("second", ["auto", "none"])
@pytest.mark.parametrize("resume", ["auto", "none"])
def test_two_processes_do_not_run_in_one_folder(make_accelerator, tmp_path, monkeypatch, resume, second):
    monkeypatch.setattr("swaft.training.run.folder.LOCK_PATIENCE_S", 0.2)
    first = RunFolder.create(tmp_path, make_accelerator(), resume=resume)
    with pytest.raises(ConfigError, match="another process is writing to"):
        RunFolder.create(tmp_path, make_accelerator(), resume=second)
    del first
    assert RunFolder.create(tmp_path, make_accelerator(), resume="auto").path == tmp_path


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_process_that_waited_for_a_run_to_end_leaves_what_it_left(
    make_accelerator, tmp_path, monkeypatch, resume
):
    first = RunFolder.create(tmp_path, make_accelerator(), resume=resume)

    def end_of_the_first(seconds: float) -> None:
        first.write_json("summary.json", {})
        first.release()

    monkeypatch.setattr("swaft.training.run.folder.time.sleep", end_of_the_first)
    with pytest.raises(ConfigError, match=r"has finished|holds another run already"):
        RunFolder.create(tmp_path, make_accelerator(), resume=resume)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("locks", [True, False])
def test_where_only_writable_files_or_none_can_be_locked_the_folder_is_locked_or_that_is_said(
    make_accelerator, tmp_path, monkeypatch, caplog, locks
):
    real = fcntl.flock

    def as_on_nfs(file, operation):
        if not (locks and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_RDWR):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return real(file, operation)

    monkeypatch.setattr("swaft.training.run.folder.fcntl.flock", as_on_nfs)
    monkeypatch.setattr("swaft.training.run.folder.LOCK_PATIENCE_S", 0.2)
    first = RunFolder.create(tmp_path, make_accelerator())
    with pytest.raises(ConfigError, match="another process") if locks else nullcontext():
        RunFolder.create(tmp_path, make_accelerator())
    assert ("another run may write to it too" in caplog.text) is not locks
    del first


def test_a_folder_that_other_machines_do_not_see_is_refused(make_accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("swaft.storage.together.SHARED_PATIENCE_S", 0.0)
    monkeypatch.setattr("swaft.training.run.folder.time.sleep", lambda seconds: None)
    monkeypatch.setattr("swaft.training.run.folder._claim", lambda path, **_: None)  # on another machine
    with pytest.raises(ConfigError, match="name one on a file system that all machines share"):
        RunFolder.create(tmp_path / "run", make_accelerator())


def test_a_run_that_started_from_anothers_checkpoint_goes_on_from_its_own(make_accelerator, tmp_path):
    def save(folder: Path, step: int) -> Path:
        save_checkpoint(shared_ranks(), folder, step, write=lambda path: {}, content={})
        return folder / f"checkpoint-{step}"

    first, run = save(tmp_path / "first", 5), tmp_path / "run"
    branch = {"resume": str(first), "config_yaml": "train: {}\n"}
    assert RunFolder.create(run, make_accelerator(), **branch).checkpoint.path == first
    made(run, "config.yaml")
    own = save(run, 7)
    assert RunFolder.create(run, make_accelerator(), **branch).checkpoint.path == own
    for other in ({"config_yaml": "train: {seed: 1}\n"}, {"resume": str(save(run, 6))}):
        with pytest.raises(ConfigError, match=r"holds later checkpoints than checkpoint-\d \(checkpoint-7\)"):
            RunFolder.create(run, make_accelerator(), **{**branch, **other})


def test_no_lock_is_put_into_a_folder_of_others(make_accelerator, tmp_path):
    made(tmp_path, "thesis.tex")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\)"):
        RunFolder.create(tmp_path, make_accelerator(), resume="auto")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("left", ["longer", "gone"])
def test_the_log_is_as_it_was_at_the_checkpoint_whatever_became_of_it(folder, left, tmp_path):
    folder.append_metrics({"step": 1})
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    folder.save_metrics(checkpoint)
    if left == "longer":
        folder.append_metrics({"step": 2})
    else:
        (folder.path / "metrics.jsonl").unlink()
    folder.restore_metrics(checkpoint)
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_what_a_killed_run_had_half_written_is_cleared_away(folder, make_accelerator):
    for name in (".final.k3x", ".final-averaged.k3x", ".best.new.k3x", ".mine"):
        (folder.path / name / "final").mkdir(parents=True)
    folder.begin("train: {}\n", make_accelerator(), engine="plain")
    assert sorted(path.name for path in folder.path.iterdir() if path.is_dir()) == [".mine"]


def test_what_the_disk_refuses_is_kept_to_be_told_to_all_ranks(folder):
    for entry in folder.path.iterdir():
        entry.unlink()
    folder.path.rmdir()
    folder.path.write_text("a file where the folder was")
    folder.append_metrics({"step": 1})
    folder.write_json("summary.json", {})
    assert "metrics.jsonl could not be written" in str(folder.failure)
