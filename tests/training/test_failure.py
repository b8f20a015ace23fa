from __future__ import annotations

import pytest

from swaft.errors import ConfigError, TrainingError
from swaft.training import failure
from swaft.training.failure import leave, run_and_report

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


def test_a_failed_rank_among_others_ends_without_tearing_the_process_group_down(monkeypatch):
    ended = []
    monkeypatch.setattr(failure.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(failure.os, "_exit", ended.append)
    with pytest.raises(SystemExit):  # reached only because the stand-in returns
        leave(1)
    assert ended == [1]
    with pytest.raises(SystemExit) as left:
        leave(0)
    assert left.value.code == 0
    assert ended == [1]


def test_an_error_that_is_not_swafts_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_and_report(failing(ZeroDivisionError()))
