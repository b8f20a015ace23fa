"""Rows to train on: found by name, checked, tokenized and padded."""

from swaft.data.classification import Collator, Task, describe_task, tokenize
from swaft.data.sources import data_folder, load_splits

__all__ = ["Collator", "Task", "data_folder", "describe_task", "load_splits", "tokenize"]
