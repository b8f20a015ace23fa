"""What the program does for every command: errors as text or JSON, and output that nobody reads to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import swaft
from swaft.cli.main import COMMANDS, main

pytestmark = pytest.mark.unit

WRONG = {
    "validate": ["no/such/recipe.py"],
    "plan": ["--device_memory", "-1", "no/such/recipe.py"],
    "average": ["no/such/folder", "--output", "out"],
    "export": ["no/such/folder", "--output", "out"],
    "report": ["no/such/run"],
    "sweep": ["recipe.py", "--seeds", "2"],
    "env": ["--yaml"],
}
"""Words that each command refuses."""


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_text_on_stderr_and_with_json_an_object_on_stdout(command, capsys):
    assert main([command, *WRONG[command]]) == 1
    as_text = capsys.readouterr()
    assert main([command, *WRONG[command], "--json"]) == 1
    as_json = capsys.readouterr()
    found = json.loads(as_json.out)
    if command == "validate":  # problems are what it prints
        as_text = SimpleNamespace(out=as_text.err, err=as_text.out)
    else:
        assert as_text.err.startswith("error: ")
        assert found["error"].endswith("Error")
    assert not as_text.out
    assert not as_json.err
    assert found["problems"]
    assert all(problem in as_text.err for problem in found["problems"])


def test_a_command_that_is_interrupted_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("swaft.cli.env.run", interrupt)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_there_is_not_is_an_error_of_the_same_form(capsys):
    assert main(["validat", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "swaft has no command 'validat'. Did you mean 'validate'?" in problem
    assert main(["validat"]) == 2
    assert problem in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "validate" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["env", "--json"], ["env", "--yaml"]])
def test_a_reader_that_closes_the_pipe_ends_the_program_without_a_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    program = subprocess.run(
        [sys.executable, "-m", "swaft", *words], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    refused = words == ["env", "--yaml"]  # which has nothing to say to the pipe
    assert program.stderr.startswith("error: ") if refused else not program.stderr
    assert program.returncode == (1 if refused else 128 + 13)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"swaft {swaft.__version__}\n"
