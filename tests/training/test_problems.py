from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swaft.errors import ConfigError, DataError
from swaft.training.checks import Parts, Problems, read_recipe
from swaft.training.data.classification import ClassificationConfig

pytestmark = pytest.mark.unit

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


def test_what_works_is_kept_and_nothing_is_refused():
    problems, ready = Problems(), Parts()
    with problems:
        ready.number = int("12", base=8)
    problems.refuse()
    assert ready.number == 10


def test_every_problem_is_kept_once_in_the_order_of_finding():
    problems = Problems()
    for error in (ConfigError(["a", "b"]), DataError("no rows"), ConfigError(["b", "c"])):
        with problems:
            raise error
    with pytest.raises(ConfigError) as caught:
        problems.refuse()
    assert caught.value.problems == ["a", "b", "no rows", "c"]


def test_what_needs_something_missing_is_left_out_without_another_problem():
    problems, ready, done = Problems(), Parts(), []
    with problems:
        raise ConfigError("a")
    with problems:
        ready.task = "a task"
        ready.columns = ready.rows.columns
        done.append("not reached")
    with problems:
        done.append(ready.columns)
    with problems:
        done.append(ready.task)
    assert (done, problems.found) == (["a task"], ["a"])
    assert not hasattr(ready, "columns")


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError])
def test_an_error_that_is_not_swafts_passes_through(error):
    with pytest.raises(error), Problems():
        raise error


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    assert {"model", "data", "train"} <= {*read_recipe(path).Config.__dataclass_fields__}


@pytest.mark.parametrize(
    "text",
    [
        "Config = 1",
        "def prepare(): ...",
        "raise SystemExit",
        "class Config: ...\ndef prepare(): ...\ntrain()",  # usual names, and nothing of swaft's
    ],
)
def test_another_script_is_no_recipe_and_is_not_run(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    assert read_recipe(tmp_path / "mine.py") is None


def test_what_cannot_be_read_as_python_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def (")
    with pytest.raises(ConfigError, match="line 1 is not Python"):
        read_recipe(tmp_path / "mine.py")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "nowhere.py")


RECIPE = """
from swaft.training.data.classification import ClassificationConfig
from sections import EXTRA
Config = ClassificationConfig
def prepare(config, problems): ...
"""


def test_a_recipe_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sections", raising=False)
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "sections.py").write_text("EXTRA = 1")
    before = [*sys.path]
    assert read_recipe(tmp_path / "mine.py").Config is ClassificationConfig
    assert sys.path == before


@pytest.mark.parametrize(
    ("beside", "extra", "expected"),
    [
        ("", "", "cannot be imported: ImportError: cannot import name 'EXTRA'"),
        ("EXTRA = 1", "missing", "cannot be imported: NameError: name 'missing'"),
        ("EXTRA = 1", "Config = dict", "Config is not a dataclass"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(beside, extra, expected, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sections", raising=False)
    (tmp_path / "mine.py").write_text(RECIPE + extra)
    (tmp_path / "sections.py").write_text(beside)
    with pytest.raises(ConfigError, match=expected):
        read_recipe(tmp_path / "mine.py")
