"""Rows are found where the configuration says, or the message says what to set."""

from __future__ import annotations

import csv
import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from swaft.errors import DataError
from swaft.training.data import sources
from swaft.training.data.chats import without_nulls
from swaft.training.data.classification import DataConfig, describe_task
from swaft.training.data.sources import data_folder, load_splits

pytestmark = pytest.mark.unit

ROWS = [{"text": 'one, "quoted"', "label": 0}, {"text": "zwölf", "label": 1}, {"text": "three", "label": 0}]


def write(path: Path, rows: list[dict] = ROWS) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".tsv":
        lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """An empty folder of task folders, named by SWAFT_DATA."""
    monkeypatch.setenv("SWAFT_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "json", "jsonl", "CSV"])
def test_every_file_format_gives_the_same_rows(tmp_path, ending):
    splits = load_splits(DataConfig(train_file=write(tmp_path / f"rows.{ending}")))
    assert splits["train"].to_list() == ROWS
    assert list(splits) == ["train"]


@pytest.mark.parametrize("ending", ["parquet", "csv", "json", "jsonl"])
def test_a_files_name_is_no_pattern(tmp_path, ending):
    write(tmp_path / f"rows1.{ending}", ROWS[:1])
    splits = load_splits(DataConfig(train_file=write(tmp_path / f"rows[1].{ending}", ROWS[:2])))
    assert splits["train"].to_list() == ROWS[:2]


def test_a_folder_that_was_saved_to_disk_is_read_without_the_caches_beside_it(tmp_path, caplog):
    splits = {
        "train": Dataset.from_list(ROWS),
        "val": Dataset.from_list(ROWS[:2]),
        "more": Dataset.from_list(ROWS),
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    load_from_disk(str(tmp_path / "saved")).map(lambda row: {"text": row["text"].upper()})
    assert list(tmp_path.rglob("cache-*.arrow"))
    with caplog.at_level(logging.INFO):
        read = load_splits(DataConfig(dataset_name=str(tmp_path / "saved")))
    assert {name: rows.to_list() for name, rows in read.items()} == {"train": ROWS, "validation": ROWS[:2]}
    assert "the splits more are not read" in caplog.text
    with pytest.raises(DataError, match=r"data\.delimiter: is about csv and tsv files"):
        load_splits(DataConfig(dataset_name=str(tmp_path / "saved"), delimiter=";"))


def test_splits_of_other_names_alone_are_named(tmp_path):
    DatasetDict({name: Dataset.from_list(ROWS) for name in ("train_sft", "test_sft")}).save_to_disk(
        str(tmp_path)
    )
    with pytest.raises(DataError, match="has the splits train_sft, test_sft; expected one named train"):
        load_splits(DataConfig(dataset_name=str(tmp_path)))


def test_local_files_are_read_without_a_network(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: calls.append(address))
    for ending in ("parquet", "csv", "tsv", "json", "jsonl"):
        load_splits(DataConfig(train_file=write(tmp_path / f"rows.{ending}")))
    assert calls == []


def test_file_that_changed_is_read_anew(tmp_path):
    data = DataConfig(train_file=write(tmp_path / "rows.csv"))
    load_splits(data)
    write(tmp_path / "rows.csv", ROWS[:2])
    assert load_splits(data)["train"].to_list() == ROWS[:2]


def test_files_of_different_formats_stand_side_by_side(tmp_path):
    data = DataConfig(
        train_file=write(tmp_path / "a.csv"),
        validation_file=write(tmp_path / "b.jsonl", ROWS[:2]),
        test_file=write(tmp_path / "c.parquet", ROWS[:1]),
    )
    assert {name: len(split) for name, split in load_splits(data).items()} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }


def test_sample_limits_keep_the_first_rows_of_their_split(tmp_path):
    path = write(tmp_path / "a.csv")
    data = DataConfig(train_file=path, validation_file=path, test_file=path)
    data.max_train_samples, data.max_eval_samples, data.max_predict_samples = 2, 1, 50
    splits = load_splits(data)
    assert splits["train"].to_list() == ROWS[:2]
    assert splits["validation"].to_list() == ROWS[:1]
    assert splits["test"].to_list() == ROWS


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.57, 57), (0.1, 10), (0.019, 1)])
def test_a_fraction_of_the_training_rows_becomes_validation_rows(tmp_path, fraction, count):
    path = write(tmp_path / "a.csv", [{"text": f"t{i}", "label": i} for i in range(100)])
    data = DataConfig(train_file=path, validation_fraction=fraction, max_train_samples=3)
    splits = load_splits(data)
    assert splits["validation"].to_list() == load_splits(data)["validation"].to_list()  # as on another rank
    validation = splits["validation"]["label"][:]
    assert len(validation) == count
    assert validation == sorted(validation) != list(range(count))
    rest = [label for label in range(100) if label not in validation]
    assert splits["train"]["label"][:] == rest[:3]


def test_a_fraction_beside_validation_rows_or_of_none_is_refused(tasks):
    (tasks / "mine").mkdir()
    write(tasks / "mine/train.parquet")
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.3 of 3 rows is no row"):
        load_splits(DataConfig(task_name="mine", validation_fraction=0.3))
    write(tasks / "mine/validation.parquet")
    with pytest.raises(DataError, match="the rows have a validation split of their own"):
        load_splits(DataConfig(task_name="mine", validation_fraction=0.5))


def test_task_folder_is_read_with_the_splits_it_has(tasks):
    (tasks / "mine").mkdir()
    write(tasks / "mine/train.parquet")
    write(tasks / "mine/test.parquet", ROWS[:1])
    splits = load_splits(DataConfig(task_name="mine"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1}


def test_task_folder_wins_over_the_hub_and_the_demo(tasks):
    for name in ("mrpc", "python_docstrings"):
        (tasks / name).mkdir()
        write(tasks / name / "train.parquet")
        assert load_splits(DataConfig(task_name=name))["train"].to_list() == ROWS


def test_unknown_task_names_the_nearest(tasks):
    (tasks / "banking77").mkdir()
    with pytest.raises(DataError, match="Did you mean 'banking77'"):
        load_splits(DataConfig(task_name="banking7"))


@pytest.mark.parametrize("name", ["./no/such", "~/no/such", "/no/such"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(name):
    with pytest.raises(DataError, match=r"data\.dataset_name: .*no/such is not a folder$"):
        load_splits(DataConfig(dataset_name=name))


def test_a_folder_that_cannot_be_read_says_what_was_expected(tmp_path):
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed/train.csv")
    write(tmp_path / "mixed/validation.jsonl")
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for name in ("mixed", "saved"):
        with pytest.raises(DataError, match=rf"{name} cannot be read: .*; expected files of one format"):
            load_splits(DataConfig(dataset_name=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["train-*.csv", "train.csv.gz", ""])
def test_several_files_or_a_compressed_one_are_read_by_another_setting(tmp_path, name):
    with pytest.raises(DataError, match=r"data\.train_file: .*\(data\.dataset_name reads folders"):
        load_splits(DataConfig(train_file=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "said"),
    [("rows.txt", r"data\.train_file: .*'\.txt'.*\.parquet"), ("absent.csv", "there is no file")],
)
def test_file_that_cannot_be_read_is_named(tmp_path, name, said):
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=said):
        load_splits(DataConfig(train_file=str(tmp_path / name)))


def test_damaged_file_is_a_data_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"rows\.parquet has no rows or is not parquet"):
        load_splits(DataConfig(train_file=str(path)))


def test_missing_train_split_is_refused(tasks):
    (tasks / "mine").mkdir()
    write(tasks / "mine/validation.parquet")
    with pytest.raises(DataError, match="found the splits validation but no train split"):
        load_splits(DataConfig(task_name="mine"))


@pytest.mark.parametrize("text", ["", "text,label\n"])
def test_file_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "empty.csv"
    path.write_text(text)
    data = DataConfig(train_file=write(tmp_path / "a.csv"), validation_file=str(path))
    with pytest.raises(DataError, match=r"data\.validation_file: .*empty\.csv has no rows"):
        load_splits(data)


def test_split_without_rows_is_named(monkeypatch):
    fake_hub(monkeypatch, {"train": ROWS, "validation": []})
    with pytest.raises(DataError, match="the validation split has no rows"):
        load_splits(DataConfig(dataset_name="some/thing"))


def test_data_folder_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("SWAFT_DATA", "/no/such/folder")
    with pytest.raises(DataError, match="SWAFT_DATA is /no/such/folder"):
        data_folder()


def test_shared_folder_beside_the_working_directory_is_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("SWAFT_DATA", raising=False)
    (tmp_path / "shared/data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert data_folder() == tmp_path / "shared/data"


def load_with(monkeypatch, load) -> None:
    """Have rows of parquet files come from a function instead of the hub."""
    monkeypatch.setattr(sources, "load_dataset_builder", lambda *_: SimpleNamespace(name="parquet"))
    monkeypatch.setattr(sources, "load_dataset", load)


def fake_hub(monkeypatch, splits: dict[str, list[dict]]) -> list[tuple]:
    calls = []

    def load(name, config_name=None, **options):
        calls.append((name, config_name, options))
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    load_with(monkeypatch, load)
    return calls


def test_glue_task_comes_from_the_hub_without_its_unlabelled_test(tasks, monkeypatch):
    calls = fake_hub(
        monkeypatch,
        {
            "train": ROWS,
            "validation_matched": ROWS,
            "validation_mismatched": ROWS[:2],
            "test_matched": ROWS,
            "test": ROWS,
        },
    )
    splits = load_splits(DataConfig(task_name="mnli"))
    assert calls == [("nyu-mll/glue", "mnli", {})]
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3,
        "validation": 3,
        "validation_mismatched": 2,
    }


def test_hub_dataset_keeps_its_test_split(monkeypatch):
    calls = fake_hub(monkeypatch, {"train": ROWS, "dev": ROWS, "test": ROWS, "extra": ROWS})
    splits = load_splits(DataConfig(dataset_name="some/thing", dataset_config_name="small"))
    assert calls == [("some/thing", "small", {})]
    assert set(splits) == {"train", "validation", "test"}


def test_unreachable_hub_says_what_to_set(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    load_with(monkeypatch, fail)
    with pytest.raises(DataError, match=r"some/thing.*no route.*data\.train_file, or SWAFT_DATA"):
        load_splits(DataConfig(dataset_name="some/thing"))


def test_a_dataset_that_is_a_script_says_where_its_rows_are(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found thing.py")

    load_with(monkeypatch, fail)
    with pytest.raises(DataError, match=r"found thing\.py; .* --revision refs/convert/parquet"):
        load_splits(DataConfig(dataset_name="some/thing"))


def test_a_folder_laid_out_as_the_hub_keeps_parquet_is_read(tmp_path):
    for name, rows in {"train/0000": ROWS[:2], "train/0001": ROWS[2:], "test/0000": ROWS[:1]}.items():
        (tmp_path / "long" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "long" / f"{name}.parquet", rows)
    splits = load_splits(DataConfig(dataset_name=str(tmp_path / "long")))
    assert {name: split.to_list() for name, split in splits.items()} == {"train": ROWS, "test": ROWS[:1]}


def test_a_text_that_looks_like_a_missing_value_stays_a_text(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nNA,0\nnull,1\nnone of it,0\n")
    splits = load_splits(DataConfig(train_file=str(tmp_path / "train.csv")))
    assert splits["train"]["text"][:] == ["NA", "null", "none of it"]


def test_a_folder_of_tables_is_read_as_its_files_are_one_by_one(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tsv").write_text('text\tlabel\n"a\t0\nb"\t1\n')
    (tmp_path / "train" / "1.tsv").write_text("text\tlabel\nNA\t1\n")
    splits = load_splits(DataConfig(dataset_name=str(tmp_path)))
    assert splits["train"].to_list() == [
        {"text": text, "label": label} for text, label in (('"a', 0), ('b"', 1), ("NA", 1))
    ]
    (tmp_path / "train" / "1.tsv").write_text("text;label\nNA;1\n")
    with pytest.raises(DataError, match=r"data\.dataset_name: .*1\.tsv: .* set data\.delimiter=';'"):
        load_splits(DataConfig(dataset_name=str(tmp_path)))


def test_a_folder_of_json_files_is_read_file_by_file_and_labels_of_several_types_are_refused(tmp_path):
    write(tmp_path / "train-0.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": None}])
    write(tmp_path / "train-1.jsonl", [{"text": "c", "label": 0.5, "more": "x"}])
    splits = load_splits(DataConfig(dataset_name=str(tmp_path)))
    assert splits["train"]["label"][:] == [0.0, None, 0.5]
    assert splits["train"]["more"][:] == [None, None, "x"]
    write(tmp_path / "train-0.jsonl", [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    write(tmp_path / "train-1.jsonl", [{"text": "c", "label": 3}, {"text": "d", "label": "neg"}])
    (tmp_path / "train-2.jsonl").touch()  # as writers of several processes leave them
    splits = load_splits(DataConfig(dataset_name=str(tmp_path)))
    assert splits["train"]["label"][:] == ["pos", "neg", 3, "neg"]
    with pytest.raises(DataError, match=r"holds the str 'pos' in row 1, but the int 3 in row 3"):
        describe_task(splits, DataConfig())


def test_chats_of_several_files_may_have_other_keys_and_calls_in_each(tmp_path):
    def chat(**more: Any) -> dict:
        return {"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "b", **more}]}

    def call(**arguments: Any) -> dict:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return {"messages": [{"role": "assistant", "tool_calls": calls}]}

    files = [[chat()], [chat(name="c"), chat(weight=0)], [call(x=1)], [call(x=1), call(y="7")]]
    for order in (files, files[::-1]):
        for number, rows in enumerate(order):
            write(tmp_path / f"train-{number}.jsonl", rows)
        read = load_splits(DataConfig(dataset_name=str(tmp_path)))["train"]["messages"][:]
        assert [without_nulls(chat) for chat in read] == [row["messages"] for rows in order for row in rows]


def test_whole_and_fractional_scores_of_two_tables_are_joined(tmp_path):
    (tmp_path / "train-0.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "train-1.csv").write_text("text,label\nc,0.5\n")
    assert load_splits(DataConfig(dataset_name=str(tmp_path)))["train"]["label"][:] == [0.0, 1.0, 0.5]
    (tmp_path / "train-2.csv").write_text("text,label\nd,\n")
    assert load_splits(DataConfig(dataset_name=str(tmp_path)))["train"]["label"][:] == [0.0, 1.0, 0.5, None]
    (tmp_path / "validation-0.csv").write_text("text,label\nd,\n")
    (tmp_path / "validation-1.csv").write_text("text,label\ne,\n")
    assert load_splits(DataConfig(dataset_name=str(tmp_path)))["validation"]["label"][:] == [None, None]
    (tmp_path / "train-3.csv").write_text("text,label\ne,pos\n")
    with pytest.raises(DataError, match=r"column 'label' of .*train-3\.csv has a different type in"):
        load_splits(DataConfig(dataset_name=str(tmp_path)))


@pytest.mark.parametrize(
    ("separator", "delimiter", "options"),
    [("\t", None, {"quoting": csv.QUOTE_NONE}), (",", None, {}), (",", ";", {"sep": ";"})],
)
def test_tables_of_the_hub_are_read_without_quoting_and_without_missing_values(
    monkeypatch, separator, delimiter, options
):
    calls = fake_hub(monkeypatch, {"train": ROWS})
    config = SimpleNamespace(sep=separator, data_files={"train": ["hf://datasets/some/thing/train.tsv"]})
    monkeypatch.setattr(
        sources, "load_dataset_builder", lambda *_: SimpleNamespace(name="csv", config=config)
    )
    load_splits(DataConfig(dataset_name="some/thing", delimiter=delimiter))
    assert calls == [("some/thing", None, {"keep_default_na": False, "na_values": [""], **options})]


def test_a_delimiter_for_rows_without_tables_is_refused(monkeypatch):
    fake_hub(monkeypatch, {"train": ROWS})
    with pytest.raises(DataError, match=r"data\.delimiter: .* some/thing has none"):
        load_splits(DataConfig(dataset_name="some/thing", delimiter=";"))
