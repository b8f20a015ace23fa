from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swaft.errors import ConfigError, DataError
from swaft.training.checks.problems import MISSING, Problems
from swaft.training.checks.recipe import is_recipe, load_recipe
from swaft.training.config import ClassificationConfig

pytestmark = pytest.mark.unit

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


def refuse(*problems: str) -> int:
    raise ConfigError(list(problems))


def test_what_works_is_returned_and_nothing_is_refused():
    problems = Problems()
    assert problems.of(int, "12", base=8) == 10
    problems.refuse()


def test_every_problem_is_kept_once_in_the_order_of_finding():
    def no_rows() -> None:
        raise DataError("no rows")

    problems = Problems()
    assert problems.of(refuse, "a", "b") is MISSING
    assert problems.of(no_rows) is MISSING
    assert problems.of(refuse, "b", "c") is MISSING
    with pytest.raises(ConfigError) as caught:
        problems.refuse()
    assert caught.value.problems == ["a", "b", "no rows", "c"]


def test_what_needs_something_missing_is_not_called_and_is_missing_too():
    problems = Problems()
    rows = problems.of(refuse, "a")
    called = []
    assert problems.of(called.append, rows) is MISSING
    assert problems.of(sorted, [1], key=rows) is MISSING
    assert rows.columns.first is MISSING
    assert (called, problems.found) == ([], ["a"])


def test_an_error_that_is_not_swafts_passes_through():
    with pytest.raises(ZeroDivisionError):
        Problems().of(divmod, 1, 0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is(path):
    assert is_recipe(path)
    recipe = load_recipe(path)
    assert {"model", "data", "train"} <= {*recipe.config_class.__dataclass_fields__}


@pytest.mark.parametrize(
    "text",
    [
        "Config = 1",
        "def prepare(): ...",
        "def (",
        "raise SystemExit",
        "class Config: ...\ndef prepare(): ...\ntrain()",  # usual names, and nothing of swaft's
    ],
)
def test_another_script_is_no_recipe_and_is_not_run(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    assert not is_recipe(tmp_path / "mine.py")
    assert not is_recipe(tmp_path / "nowhere.py")


RECIPE = """
from swaft.training.config import ClassificationConfig
from sections import EXTRA
Config = ClassificationConfig
def prepare(config, problems): ...
"""


def test_a_recipe_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sections", raising=False)
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "sections.py").write_text("EXTRA = 1")
    assert is_recipe(tmp_path / "mine.py")
    before = [*sys.path]
    assert load_recipe(tmp_path / "mine.py").config_class is ClassificationConfig
    assert sys.path == before


@pytest.mark.parametrize(
    ("beside", "extra", "expected"),
    [
        ("", "", "cannot be imported: ImportError: cannot import name 'EXTRA'"),
        ("EXTRA = 1", "missing", "cannot be imported: NameError: name 'missing'"),
        ("EXTRA = 1", "Config = dict", "Config is no dataclass"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(beside, extra, expected, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sections", raising=False)
    (tmp_path / "mine.py").write_text(RECIPE + extra)
    (tmp_path / "sections.py").write_text(beside)
    with pytest.raises(ConfigError, match=expected):
        load_recipe(tmp_path / "mine.py")
