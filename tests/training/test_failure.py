from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from torch.distributed import DistNetworkError, DistStoreError

from swaft.errors import ConfigError, TrainingError
from swaft.training import failure
from swaft.training.failure import run_and_report

pytestmark = pytest.mark.unit


def failing(error: Exception):
    def run() -> None:
        raise error

    return run


def test_a_run_that_ends_well_exits_with_zero(capsys):
    assert run_and_report(lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_an_error_of_swaft_is_one_message_without_traceback(capsys):
    assert run_and_report(failing(ConfigError(["first: wrong", "second: wrong"]))) == 1
    said = capsys.readouterr().err
    assert said == "error: 2 problems with this run:\n  - first: wrong\n  - second: wrong\n"


def test_where_an_error_was_found_is_said_too(capsys):
    error = TrainingError("bad")
    error.add_note("found on rank 1 of 2")
    run_and_report(failing(error))
    assert capsys.readouterr().err == "error: bad\n  (found on rank 1 of 2)\n"


def test_another_rank_speaks_only_after_the_launcher_had_time_to_end_it(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(failure.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert run_and_report(failing(TrainingError("bad"))) == 1
    assert waited == [failure.GRACE_S]
    assert capsys.readouterr().err == "error on rank 1: bad\n"


@pytest.mark.parametrize(
    ("ranks", "code", "said"),
    [("2", 0, "told\nlast\n"), ("2", 1, "told\n"), ("1", 0, "told\nlast\ntorn down\n")],
)
def test_one_rank_of_several_ends_without_pythons_tear_down(ranks, code, said):
    script = (
        "import atexit; from swaft.training.failure import leave\n"
        "class Left:\n"
        "    def __del__(self): print('torn down')\n"
        "left = Left(); atexit.register(print, 'last'); print('told')\n"
        f"leave({code})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"WORLD_SIZE": ranks}, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == said


def test_an_error_that_is_not_swafts_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_and_report(failing(ZeroDivisionError()))


CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:4711"
)
SILENT = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv"
)

ASKED_AGAIN = "Application timeout caused pair closure"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (ASKED_AGAIN, "other ranks did not answer within train.ddp_timeout seconds"),
        (CLOSED, "other ranks are gone"),
        (SILENT, "other ranks did not answer within train.ddp_timeout seconds"),
    ],
)
def test_ranks_that_are_lost_are_told_in_words_wherever_that_is_noticed(found, told, capsys):
    in_the_averager = TrainingError(f"averaging failed on this rank: RuntimeError: {found}; no more")
    while_cleaning_up = TrainingError("the ranks did not arrive")
    while_cleaning_up.__context__ = RuntimeError(found)
    for error in (RuntimeError(found), in_the_averager, while_cleaning_up):
        assert run_and_report(failing(error)) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {told}")
        assert found.removeprefix("[/pytorch/third_party/gloo/") in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            DistNetworkError(
                "The client socket has timed out after 15000ms while trying to connect to (n1, 1)."
            ),
            "other ranks did not answer within train.ddp_timeout seconds",
        ),
        (
            DistStoreError("Timed out after 16 seconds waiting for clients. 1/2 clients joined."),
            "other ranks did not answer within train.ddp_timeout seconds",
        ),
        (DistNetworkError("Connection reset by peer"), "other ranks are gone"),
    ],
    ids=["first rank", "another rank", "came and went"],
)
def test_ranks_that_do_not_come_to_the_start_are_told_in_words(error, told, capsys):
    assert run_and_report(failing(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}")
    assert str(error) in said


def test_a_port_that_is_taken_is_not_a_lost_rank():
    taken = "The server socket has failed to listen on any local network address. port: 29500, EADDRINUSE"
    with pytest.raises(DistNetworkError, match="EADDRINUSE"):
        run_and_report(failing(DistNetworkError(taken)))


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory", "Connection closed by peer", "gloo/transport/tcp: bad address", "timed out"],
)
def test_a_runtime_error_that_is_not_about_lost_ranks_keeps_its_traceback(message):
    with pytest.raises(RuntimeError, match=message):
        run_and_report(failing(RuntimeError(message)))


def test_the_launcher_gets_the_message_to_say_last(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run_and_report(failing(TrainingError("something is wrong " * 20)))
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"].split() == ["something", "is", "wrong"] * 20
    assert max(map(len, told["message"].splitlines())) <= 100
    assert "py_callstack" not in told["extraInfo"]


def test_the_way_to_an_error_is_shown_where_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("SWAFT_TRACEBACK", "1")
    assert run_and_report(failing(TrainingError("bad"))) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: bad\n")
