"""The task data that the shipped configs name loads, row for row."""

from __future__ import annotations

import pytest

from swaft.training.data.classification import DataConfig, describe_task
from swaft.training.data.sources import data_folder, load_splits

pytestmark = pytest.mark.realdata

# Task: text columns, number of labels, rows of train, validation and test.
TASKS = {
    "cola": (("sentence",), 2, (8551, 1043, 0)),
    "sst2": (("sentence",), 2, (67349, 872, 1821)),
    "mrpc": (("sentence1", "sentence2"), 2, (3576, 500, 1725)),
    "rte": (("sentence1", "sentence2"), 2, (2490, 277, 0)),
    "stsb": (("sentence1", "sentence2"), 1, (5749, 1500, 1379)),
    "banking77": (("text",), 77, (9005, 998, 3080)),
    "trec": (("text",), 6, (4941, 500, 500)),
    "subj": (("text",), 2, (7998, 1000, 1000)),
    "cr": (("text",), 2, (2662, 400, 700)),
    "mpqa": (("text",), 2, (5233, 1000, 2000)),
}


@pytest.mark.parametrize("name", TASKS)
def test_task_has_its_columns_labels_and_rows(name):
    folder = data_folder()
    if folder is None or not (folder / name).is_dir():
        pytest.skip(f"no task folder {name}: set SWAFT_DATA to the folder of task folders (now {folder})")
    columns, num_labels, rows = TASKS[name]
    splits = load_splits(DataConfig(task_name=name))
    task = describe_task(splits, DataConfig(task_name=name))
    assert (task.text_columns, task.num_labels) == (columns, num_labels)
    assert task.is_regression is (name == "stsb")
    assert tuple(len(splits.get(split, ())) for split in ("train", "validation", "test")) == rows
