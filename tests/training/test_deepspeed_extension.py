from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from swaft.errors import TrainingError
from swaft.training.launch import deepspeed_extension as extension

pytestmark = pytest.mark.unit

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")


def lock_of_age(folder: Path, seconds: float) -> Path:
    lock = folder / "lock"
    lock.touch()
    then = time.time() - seconds
    os.utime(lock, (then, then))
    return lock


def test_an_old_lock_that_no_build_holds_is_refused_by_name(tmp_path):
    lock = lock_of_age(tmp_path, 3600)
    with pytest.raises(TrainingError, match="60 minutes old") as caught:
        extension.refuse_stale_lock(tmp_path)
    assert str(lock) in str(caught.value)
    assert lock.exists()


def test_a_young_lock_is_left_to_the_build_that_may_hold_it_elsewhere(tmp_path):
    lock_of_age(tmp_path, 30)
    extension.refuse_stale_lock(tmp_path)


@needs_proc
def test_an_old_lock_that_a_running_build_holds_is_waited_for(tmp_path):
    with lock_of_age(tmp_path, 3600).open():
        extension.refuse_stale_lock(tmp_path)


def test_a_lock_that_the_kernel_frees_is_neither_refused_nor_deleted(tmp_path, monkeypatch):
    monkeypatch.delattr("torch.utils.cpp_extension.FileBaton")  # as from torch 2.14 on
    lock = lock_of_age(tmp_path, 3600)
    extension.refuse_stale_lock(tmp_path)
    assert not extension.remove_left_behind_lock(tmp_path)
    assert lock.exists()


def test_no_lock_is_fine(tmp_path):
    extension.refuse_stale_lock(tmp_path)


def test_a_lock_left_behind_is_deleted_before_building(tmp_path):
    lock = lock_of_age(tmp_path, 5)
    assert extension.remove_left_behind_lock(tmp_path)
    assert not lock.exists()


@needs_proc
def test_the_lock_of_a_running_build_is_not_deleted(tmp_path):
    lock = lock_of_age(tmp_path, 3600)
    with lock.open():
        assert not extension.remove_left_behind_lock(tmp_path)
    assert lock.exists()


def test_nothing_is_built_without_deepspeed(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "build_folder", lambda: pytest.fail("built"))
    with caplog.at_level("INFO"):
        assert extension.main() == 0
    assert "DeepSpeed is not installed" in caplog.text


def test_nothing_is_built_where_cuda_is_present(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "CUDA" in (extension.reason_not_to_build() or "")


def test_extensions_live_in_the_virtual_environment_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("PATH", "/somewhere")
    extension.use_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    extension.use_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"
    assert os.environ["PATH"] == f"{tmp_path / 'bin'}{os.pathsep}/somewhere"  # once, and first


def test_an_environment_that_may_not_be_written_to_keeps_no_extensions(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    extension.use_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
