"""Which commit the software in use is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from swaft import environment

pytestmark = pytest.mark.unit


@pytest.fixture
def project(tmp_path):
    """A repository with one commit, and the function that runs git in it."""

    def git(*words: str) -> str:
        line = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "a project")
    return tmp_path, git


def moved_to(folder: Path, monkeypatch) -> None:
    folder.mkdir(parents=True)
    (folder / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))


def test_an_installation_inside_another_projects_tree_is_not_of_that_projects_commit(project, monkeypatch):
    moved_to(project[0] / ".venv/lib/swaft", monkeypatch)
    assert environment.software()["git_commit"] is None


def test_a_source_tree_is_of_its_commit(project, monkeypatch):
    root, git = project
    moved_to(root / "swaft", monkeypatch)
    git("add", ".")
    git("commit", "-m", "the library")
    assert environment.software()["git_commit"] == git("rev-parse", "HEAD")
