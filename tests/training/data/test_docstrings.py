"""The task made of the standard library's docstrings: repeatable, clean, and learnable in principle."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from swaft.errors import DataError
from swaft.training.data.classification import DataConfig, describe_task
from swaft.training.data.docstrings import (
    AREAS,
    MASK,
    MAX_ROWS_PER_AREA,
    MAX_WORDS,
    MIN_ROWS_PER_AREA,
    MIN_WORDS,
    docstring_splits,
)
from swaft.training.data.sources import load_splits

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def splits():
    return docstring_splits()


def test_task_is_reachable_by_name(splits, monkeypatch, tmp_path):
    monkeypatch.setenv("SWAFT_DATA", str(tmp_path))
    data = DataConfig(task_name="python_docstrings")
    loaded = load_splits(data)
    task = describe_task(loaded, data)
    assert (task.text_columns, task.label_column) == (("text",), "label")
    assert task.label_names == splits["train"].features["label"].names
    # Built twice, the rows are the same in the same order.
    assert {name: split.to_list() for name, split in loaded.items()} == {
        name: split.to_list() for name, split in splits.items()
    }


def test_sizes_are_those_promised(splits):
    sizes = {name: len(split) for name, split in splits.items()}
    total = sum(sizes.values())
    assert 1500 <= total <= 2500
    assert sizes["train"] / total == pytest.approx(0.7, abs=0.04)
    assert sizes["validation"] / total == pytest.approx(0.1, abs=0.03)
    assert sizes["test"] / total == pytest.approx(0.2, abs=0.04)


def test_every_area_has_enough_rows_and_none_too_many(splits):
    counts = Counter(label for split in splits.values() for label in split["label"])
    assert len(counts) >= 10
    assert min(counts.values()) >= MIN_ROWS_PER_AREA
    assert max(counts.values()) <= MAX_ROWS_PER_AREA


def test_no_text_and_no_member_occurs_twice(splits):
    texts = [text.lower() for split in splits.values() for text in split["text"]]
    members = [member for split in splits.values() for member in split["member"]]
    assert len(set(texts)) == len(texts)
    assert len(set(members)) == len(members)


def test_texts_are_of_bounded_length(splits):
    for split in splits.values():
        for text in split["text"]:
            assert len(text.split()) <= MAX_WORDS
            assert len(text.replace(MASK, "").split()) >= MIN_WORDS


def test_names_that_give_the_area_away_are_masked(splits):
    names = splits["train"].features["label"].names
    for split in splits.values():
        for row in split:
            modules = "|".join(re.escape(name) for name in AREAS[names[row["label"]]].split())
            assert not re.search(rf"\b({modules})\b", row["text"], re.IGNORECASE), row
            last = row["member"].split(".")[-1]
            assert not re.search(rf"(?<![\w.]){re.escape(last)}(?![\w.])", row["text"], re.IGNORECASE), row


def test_split_of_a_member_does_not_depend_on_the_other_members(tmp_path):
    def library(count: int):
        lines = [f'def f{i}():\n    """Say number {i} and then four more words."""\n' for i in range(count)]
        lines += [f'def g{i}():\n    """Give number {i} and then four more words."""\n' for i in range(count)]
        (tmp_path / "logging").mkdir(exist_ok=True)
        (tmp_path / "logging/__init__.py").write_text("".join(lines[:count]))
        (tmp_path / "random.py").write_text("".join(lines[count:]))
        made = docstring_splits(tmp_path)
        return {member: name for name, split in made.items() for member in split["member"]}

    small, large = library(80), library(150)
    assert len(small) == 160
    assert small == {member: split for member, split in large.items() if member in small}


def test_source_is_parsed_and_never_run(tmp_path):
    for module, thing in (("random", "apples"), ("zipfile", "pears")):
        docstrings = (f"Count {thing} up to {i} and back again." for i in range(80))
        body = "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings))
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')\n" + body)
    assert sum(len(split) for split in docstring_splits(tmp_path).values()) == 160


def test_library_without_source_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"too few docstrings.*data\.train_file"):
        docstring_splits(tmp_path)
