from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from swaft.errors import ConfigError, NoiseError, TrainingError
from swaft.training.launch import failure
from swaft.training.launch.failure import run_and_report

pytestmark = pytest.mark.unit


def failing(error: BaseException):
    def run() -> None:
        raise error

    return run


def test_a_run_that_ends_well_exits_with_zero(capsys):
    assert run_and_report(lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_an_error_of_swaft_is_one_message_without_traceback(capsys):
    assert run_and_report(failing(ConfigError(["first: wrong", "second: wrong"]))) == 1
    said = capsys.readouterr().err
    assert said == "error: 2 problems:\n  - first: wrong\n  - second: wrong\n"


def test_an_error_of_an_objective_is_reported_with_the_section_of_its_settings(capsys):
    run_and_report(failing(NoiseError("Set fused=False.")))
    assert capsys.readouterr().err == "error: section noise: Set fused=False.\n"


def test_a_run_that_was_asked_to_end_says_with_which_setting_it_resumes(capsys):
    assert run_and_report(failing(failure.Interrupted())) == failure.EXIT_CODE
    assert "when it is started again with train.resume_from_checkpoint=auto" in capsys.readouterr().err


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
    [
        ("2", 0, "told\nlast\n"),
        ("2", 130, "told\nlast\n"),
        ("2", 1, "told\n"),
        ("1", 0, "told\nlast\ntorn down\n"),
    ],
)
def test_one_rank_of_several_ends_without_pythons_tear_down(ranks, code, said):
    script = (
        "import atexit; from swaft.training.launch.failure import leave\n"
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


@pytest.fixture
def sigterm_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_as_before")
def test_ctrl_c_is_one_line_of_the_first_rank_without_traceback(monkeypatch, capsys):
    error = KeyboardInterrupt()
    assert run_and_report(failing(error)) == 130
    assert capsys.readouterr().err == "interrupted\n"
    error.add_note("it resumes")
    run_and_report(failing(error))
    assert capsys.readouterr().err == "interrupted; it resumes\n"
    monkeypatch.setenv("RANK", "1")
    run_and_report(failing(error))
    assert capsys.readouterr().err == ""


def test_an_error_that_is_not_swafts_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_and_report(failing(ZeroDivisionError()))


@pytest.fixture
def ranks_that_meet(monkeypatch):
    """The place where four ranks met, of which this process is the second; two others say that they are there."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "4", "RANK": "1"}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(failure, "GRACE_S", 0.5)
    for other in (0, 3):
        store.set(f"swaft/there/0/{other}", "")
    return store


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
def test_ranks_that_are_lost_are_told_in_words_wherever_that_is_noticed(found, told, ranks_that_meet, capsys):
    in_the_averager = TrainingError(f"averaging failed on this rank: RuntimeError: {found}; no more")
    while_cleaning_up = TrainingError("the ranks did not arrive")
    while_cleaning_up.__context__ = RuntimeError(found)
    for error in (RuntimeError(found), in_the_averager, while_cleaning_up):
        assert run_and_report(failing(error)) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error on rank 1: {told}")
        assert "of 4 ranks these said nothing for 0.5 s: 2)" in said
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
def test_ranks_that_do_not_come_to_the_start_are_told_in_words(error, told, ranks_that_meet, capsys):
    assert run_and_report(failing(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error on rank 1: {told}")
    assert str(error) in said


def test_the_first_rank_says_at_once_what_is_wrong_and_then_who_is_gone(ranks_that_meet, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    for other in (1, 2):
        ranks_that_meet.set(f"swaft/there/0/{other}", "")
    ranks_that_meet.delete_key("swaft/there/0/3")
    run_and_report(failing(RuntimeError(CLOSED)))
    said = capsys.readouterr().err.split("error: ")
    assert said[1].startswith("other ranks are gone")
    assert said[2] == "of 4 ranks these said nothing for 0.5 s: 3\n"


def test_where_all_ranks_are_there_the_network_is_named(ranks_that_meet, capsys):
    ranks_that_meet.set("swaft/there/0/2", "")
    run_and_report(failing(RuntimeError(CLOSED)))
    assert "all 4 ranks are there, so it is the network between them" in capsys.readouterr().err


def test_where_the_ranks_cannot_meet_any_more_that_place_is_named(ranks_that_meet, monkeypatch, capsys):
    with socket.socket() as taken_by_nobody:
        taken_by_nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(taken_by_nobody.getsockname()[1]))
        run_and_report(failing(RuntimeError(CLOSED)))
    assert "where the ranks met, does not answer" in capsys.readouterr().err


def test_what_ranks_said_before_they_were_started_anew_does_not_count(ranks_that_meet, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_and_report(failing(RuntimeError(CLOSED)))
    assert "of 4 ranks these said nothing for 0.5 s: 0, 2, 3" in capsys.readouterr().err


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
