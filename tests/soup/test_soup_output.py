"""The folder that is written: whole under its name or not there, and nothing beside it touched."""

from __future__ import annotations

import os

import pytest
from soup_folders import folder_of, folders, golden, loaded, random_tensors, same_bits

import swaft.soup.soup as average_module
from swaft.errors import ConfigError, StateError
from swaft.soup import average, average_greedily
from swaft.soup import output as output_module

pytestmark = pytest.mark.unit


def test_a_folder_with_files_is_not_touched(tmp_path):
    paths = folders(tmp_path, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "precious", tmp_path / "link"):
        with pytest.raises(StateError, match="is there already; nothing was changed"):
            average(paths, path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    average(folders(tmp_path, 1), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["copy_files", "write_weights", "check_weights", "write_json"])
def test_a_crash_leaves_no_folder_of_the_name(tmp_path, monkeypatch, fault, where):
    def crash(*arguments, **keywords):
        raise fault

    paths = folders(tmp_path, 2)
    monkeypatch.setattr(average_module, where, crash)
    with pytest.raises((KeyboardInterrupt, OSError)):
        average(paths, tmp_path / "out")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in0", "in1"]


@pytest.mark.parametrize("name", ["out.unfinished", "out.trial", ".out"])
def test_a_folder_beside_the_output_is_not_touched_whatever_its_name(tmp_path, name):
    paths = [folder_of(tmp_path / name, random_tensors(0)), *folders(tmp_path, 1)]
    average(paths, tmp_path / "out")
    average_greedily(paths, tmp_path / "greedy", score=lambda folder: 1.0, higher_is_better=True)
    assert same_bits(loaded(tmp_path / name), random_tensors(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "greedy", "in0", "out"])


def test_of_two_averages_to_one_output_the_first_stays_whole(tmp_path, monkeypatch):
    paths, real, again = folders(tmp_path, 2), average_module.check_weights, []

    def overtaken(*arguments):
        real(*arguments)
        if not again:
            again.append(True)
            average(paths[:1], tmp_path / "out")

    monkeypatch.setattr(average_module, "check_weights", overtaken)
    with pytest.raises(StateError, match="out is there already; nothing was changed in it"):
        average(paths, tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), golden([random_tensors(0)]))
    assert (tmp_path / "out" / "average.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in0", "in1", "out"]


def test_a_folder_that_was_made_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    paths, real = folders(tmp_path, 1), average_module.check_weights

    def overtaken(*arguments):
        real(*arguments)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(average_module, "check_weights", overtaken)
    with pytest.raises(StateError, match="out could not be named: File exists"):
        average(paths, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_renamed_leaves_nothing(tmp_path, monkeypatch):
    real = os.rename

    def refused(source, target):
        if str(target).endswith("out"):
            raise OSError(5, "Input/output error")
        real(source, target)

    paths = folders(tmp_path, 1)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(StateError, match="out could not be named: Input/output error"):
        average(paths, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in0"]


@pytest.mark.parametrize("output", ["", ".", "..", "a/..", "a\0b"])
def test_an_output_that_is_no_name_of_a_folder_is_refused(tmp_path, monkeypatch, output):
    paths = folders(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="expected the path of a new folder, such as runs/soup"):
        average(paths, output)


def test_names_that_are_too_long_are_an_error_that_says_so(tmp_path):
    (path,) = folders(tmp_path, 1)
    for paths, output, base in [
        ([path], tmp_path / ("x" * 300), None),
        (["x" * 300], tmp_path / "out", None),
        ([path], tmp_path / "out", "x" * 300),
    ]:
        with pytest.raises(StateError, match=r"x could not be .*: File name too long"):
            average(paths, output, base=base)
    average([path], tmp_path / ("x" * 250))
    assert (tmp_path / ("x" * 250) / "model.safetensors").exists()


def test_a_link_that_leads_to_itself_is_an_error_that_names_it(tmp_path):
    (path,) = folders(tmp_path, 1, shards=2)
    file = path / "model-00001-of-00002.safetensors"
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(StateError, match=r"00001-of-00002.safetensors could not be opened: .*link"):
        average([path], tmp_path / "out")


def test_a_configuration_that_is_nested_without_end_is_refused(tmp_path):
    (path,) = folders(tmp_path, 1)
    (path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(StateError, match=r"in0/config.json: nested too deep"):
        average([path], tmp_path / "out")


def test_a_number_that_json_lacks_is_refused_with_a_remedy(tmp_path):
    (path,) = folders(tmp_path, 1)
    (path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    with pytest.raises(StateError, match=r"found Infinity, which is not a JSON number.*save_pretrained"):
        average([path], tmp_path / "out")


def test_weights_that_do_not_read_as_they_were_written_are_refused(tmp_path, monkeypatch):
    real = output_module.hash_file

    def damaged(path):
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        return real(path)

    monkeypatch.setattr(output_module, "hash_file", damaged)
    with pytest.raises(StateError, match=r"model.safetensors does not read as it was written"):
        average(folders(tmp_path, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
