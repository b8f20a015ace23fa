"""Loads the rows that `config.data` specifies: from a task folder, a local file, the hub, or the built-in demo."""

from __future__ import annotations

import csv
import glob
import json
import logging
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    List,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)

from swaft.errors import DataError
from swaft.fraction import share_of
from swaft.options import suggestion
from swaft.training.config import RowsConfig
from swaft.training.config.values import DELIMITERS
from swaft.training.data.files import FILE_READERS, TABLES, cause, require_utf8

logger = logging.getLogger(__name__)

Splits = dict[str, Dataset]

DEMO_TASK = "python_docstrings"
GLUE = "nyu-mll/glue"
GLUE_NAMES = (GLUE, "glue")
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")

# A split's name in the source -> its name here. MNLI has two validation sets.
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "validation_matched": "validation",
    **dict.fromkeys(("dev", "val", "valid", "eval"), "validation"),
    "validation_mismatched": "validation_mismatched",
    "test": "test",
}

EVALUATED = ("validation", "test")
"""Splits that a language to evaluate on may have."""

OFFLINE = "without a network set data.train_file, or SWAFT_DATA to a folder of task folders"
SCRIPT = (
    "the hub keeps its rows as parquet too: hf download NAME --repo-type dataset --revision refs/convert/parquet "
    "--local-dir DIR, then data.dataset_name=DIR/CONFIGURATION"
)
"""Advice without a network, and for a dataset that is a Python script, which datasets no longer runs."""
FOLDERS = "data.dataset_name reads folders of files, and compressed files"
FORMATS = (
    "expected files of one format, with names that start with their split (train-0.csv, validation.csv), or what "
    "DatasetDict.save_to_disk writes"
)
"""Advice for a path that is not a file, and for a folder that cannot be read."""


def load_splits(data: RowsConfig) -> Splits:
    """Return the rows by split.

    `train` is always there; `validation`, `validation_mismatched` and `test` if the source has them, and
    `validation_de`, `test_de` and so on for the languages to evaluate on.
    The columns are unchanged. `validation_fraction` takes rows of train for validation; `max_train_samples` and
    similar settings keep the first rows of a split.

    Raises:
        DataError: the rows cannot be found or read, a split is empty or missing, or `validation_fraction` is set
            but there is a validation split already.
    """
    if data.task_name is not None:
        splits = _load_task(data.task_name)
    elif data.dataset_name is not None:
        splits = _load_hub(data.dataset_name, data.dataset_config_name, data.delimiter)
    else:
        files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        splits = {
            split: _load_file(path, f"data.{split}_file", data.delimiter)
            for split, path in files.items()
            if path is not None
        }
    if "train" not in splits:
        found = ", ".join(splits) or "(none)"
        raise DataError(f"found the splits {found} but no train split; set data.train_file")
    if data.validation_fraction is not None:
        splits = _with_validation(splits, data.validation_fraction)
    for language in data.languages:
        splits |= _load_language(data, language)
    limits = {"train": data.max_train_samples, "test": data.max_predict_samples}
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"the {name} split has no rows; add some, or leave the split out")
        limit = limits.get(name.split("_")[0], data.max_eval_samples)
        if limit is not None:
            splits[name] = split.select(range(min(limit, len(split))))
    return splits


def language_groups(splits: Mapping[str, Any], data: RowsConfig) -> dict[str, list[str]]:
    """Return the splits that differ only in language, by the name of their mean: `test_mean`: `test`, `test_de`."""
    groups = {}
    for name in EVALUATED:
        same = [name, *(f"{name}_{language}" for language in data.languages)]
        groups[f"{name}_mean"] = [split for split in same if split in splits]
    return {name: same for name, same in groups.items() if len(same) > 1}


def task_of(data: RowsConfig) -> str | None:
    """Return the name of the task: `task_name`, or the configuration of GLUE on the hub; None: it has no name."""
    return data.dataset_config_name if data.dataset_name in GLUE_NAMES else data.task_name


def data_folder() -> Path | None:
    """Find the folder of task folders: `$SWAFT_DATA`, else ../shared/data next to the working or package folder.

    Raises:
        DataError: `SWAFT_DATA` names a folder that does not exist.
    """
    named = os.environ.get("SWAFT_DATA")
    if named:
        if not Path(named).is_dir():
            raise DataError(
                f"SWAFT_DATA is {named}, which is not a folder; set it to the folder of task folders"
            )
        return Path(named)
    package_root = Path(__file__).resolve().parents[3]
    candidates = (root.parent / "shared" / "data" for root in (Path.cwd(), package_root))
    return next((folder for folder in candidates if folder.is_dir()), None)


def _load_language(data: RowsConfig, language: str) -> Splits:
    """Read the evaluation rows of a language: a dataset's configuration, or files next to others (test.de.csv)."""
    if data.dataset_name:
        found = _load_hub(data.dataset_name, language, data.delimiter)
    else:
        files = {"validation": data.validation_file, "test": data.test_file}
        folder = _task_folder(data.task_name) if data.task_name is not None else None
        if folder is not None:
            files = {split: str(folder / f"{split}.parquet") for split in EVALUATED}
        named = {split: Path(path) for split, path in files.items() if path}
        beside = {split: path.with_suffix(f".{language}{path.suffix}") for split, path in named.items()}
        found = {
            split: _load_file(str(path), "data.eval_languages", data.delimiter)
            for split, path in beside.items()
            if path.is_file()
        }
    kept = {f"{name}_{language}": rows for name, rows in found.items() if name in EVALUATED}
    if not kept:
        raise DataError(
            f"data.eval_languages: for '{language}' there are neither validation nor test rows; expected them "
            "in a configuration of data.dataset_name with that name, or in a file next to those of the training "
            f"language (test.csv, test.{language}.csv)"
        )
    return kept


def _task_folder(task_name: str) -> Path | None:
    root = data_folder()
    return root / task_name if root and (root / task_name).is_dir() else None


def _load_task(task_name: str) -> Splits:
    folder = _task_folder(task_name)
    if folder is not None:
        files = {split: folder / f"{split}.parquet" for split in ("train", *EVALUATED)}
        there = {split: str(path) for split, path in files.items() if path.exists()}
        return {split: _load_file(path, "data.task_name") for split, path in there.items()}
    if task_name == DEMO_TASK:
        from swaft.training.data.docstrings import docstring_splits  # only here: it takes a while

        return docstring_splits()
    if task_name in GLUE_TASKS:
        return _load_hub(GLUE, task_name)
    root = data_folder()
    local = sorted(path.name for path in root.iterdir() if path.is_dir()) if root else []
    known = sorted({DEMO_TASK, *GLUE_TASKS, *local})
    raise DataError(
        f"data.task_name: '{task_name}' is neither a folder of {root or 'SWAFT_DATA (not set)'} nor one of "
        f"{', '.join(known)}.{suggestion(task_name, known)} For your own rows set data.train_file"
    )


def _load_file(path: str, setting: str, delimiter: str | None = None, **options: Any) -> Dataset:
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_READERS:
        expected = f"expected one of {', '.join(FILE_READERS)} ({FOLDERS})"
        raise DataError(f"{setting}: {path} ends in '{suffix}'; {expected}")
    if not Path(path).is_file():
        raise DataError(f"{setting}: there is no file {Path(path).absolute()} ({FOLDERS})")
    if delimiter and suffix in TABLES:
        options["delimiter"] = DELIMITERS.get(delimiter, delimiter)
    try:
        if suffix != ".parquet":
            require_utf8(path)
        return FILE_READERS[suffix](path, **options)
    except DataError as error:
        raise DataError(f"{setting}: {path}{error}") from error
    except Exception as error:  # the readers raise their own types (arrow, pandas, datasets)
        raise DataError(f"{setting}: {path} has no rows or is not {suffix[1:]}: {cause(error)}") from error


def _load_hub(name: str, config_name: str | None, delimiter: str | None = None) -> Splits:
    try:
        found = _load_dataset(name, config_name, delimiter)
    except DataError:
        raise
    except Exception as error:  # hub, network and cache each raise their own types
        which = f"{name} ({config_name})" if config_name else name
        reason = cause(error)
        if name[:1] in (".", "/", "~") or Path(name).exists():
            there = f"cannot be read: {reason}; {FORMATS}" if Path(name).is_dir() else "is not a folder"
            raise DataError(f"data.dataset_name: {which} {there}") from error
        mend = SCRIPT if "scripts are no longer" in reason else OFFLINE
        raise DataError(f"{which} cannot be loaded from the hub: {reason}; {mend}") from error
    if not isinstance(found, DatasetDict):
        raise DataError(f"data.dataset_name: {name} has no splits; set data.train_file instead")
    kept = {SPLIT_NAMES[str(split)]: rows for split, rows in found.items() if split in SPLIT_NAMES}
    left = [str(split) for split in found if split not in SPLIT_NAMES]
    if not kept:
        raise DataError(
            f"data.dataset_name: {name} has the splits {', '.join(left)}; expected one named train. Save the "
            "rows of one as parquet, and set data.train_file to it"
        )
    if left:
        logger.info("%s: the splits %s are not read", name, ", ".join(left))
    if name in GLUE_NAMES:  # labels of its test splits are withheld (-1): there is nothing to score
        kept.pop("test", None)
    return kept


def _load_dataset(name: str, config_name: str | None, delimiter: str | None) -> Any:
    """Read a dataset from the hub or a folder; no row or text of local tables and json files is lost."""
    saved = _saved_files(name)
    source: Any = ("arrow", None, None, saved) if saved else (name, config_name)  # path, name, folder, files
    builder: Any = load_dataset_builder(*source)
    if builder.name != "csv" and delimiter is not None:
        raise DataError(f"data.delimiter: is about csv and tsv files, but {name} has none; remove it")
    if builder.name not in ("csv", "json"):
        return load_dataset(*source)
    files = {str(split): list(map(str, paths)) for split, paths in builder.config.data_files.items()}
    if all(
        Path(path).is_file() and Path(path).suffix.lower() in FILE_READERS for path in chain(*files.values())
    ):
        return DatasetDict({split: _load_shards(paths, delimiter) for split, paths in files.items()})
    if builder.name == "json":
        return load_dataset(*source)
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    if builder.config.sep == "\t":
        options["quoting"] = csv.QUOTE_NONE
    if delimiter is not None:
        options["sep"] = DELIMITERS.get(delimiter, delimiter)
    return load_dataset(*source, **options)


def _load_shards(paths: list[str], delimiter: str | None) -> Dataset:
    """Read files one by one, and join their rows.

    Whole numbers become fractions if another file has fractions in their column. A column of json files with values
    of several types becomes Json.
    """
    paths = [path for path in paths if Path(path).stat().st_size] or paths  # writers leave empty files
    shards = [_load_file(path, "data.dataset_name", delimiter) for path in paths]
    joint, empty = dict[str, Any](), dict[str, Any]()
    for path, shard in zip(paths, shards, strict=True):
        for column, feature in shard.features.items():
            if shard.data.column(column).null_count == len(shard):
                empty.setdefault(column, feature)  # the type of a column without values says nothing
                continue
            try:
                joint[column] = _joint_type(joint.get(column, feature), feature)
            except pyarrow.ArrowTypeError as error:
                if not _is_table(path):
                    joint[column] = Json()
                    continue
                raise DataError(
                    f"data.dataset_name: column '{column}' of {path} has a different type in the files before it "
                    f"({error}); write it with one type, or join the files into one"
                ) from error
    types = empty | joint
    wanted = [Features({name: types[name] for name in shard.column_names}) for shard in shards]
    return concatenate_datasets(list(map(_as_type, shards, paths, wanted)))


def _is_table(path: str) -> bool:
    return Path(path).suffix.lower() in TABLES


def _as_type(shard: Dataset, path: str, features: Features) -> Dataset:
    if shard.features == features:
        return shard
    if _is_table(path) or "Json(" not in repr(features):
        return shard.cast(features)
    # A cast would turn values that are already Json into texts inside Json.
    return _load_file(path, "data.dataset_name", features=features)


def _joint_type(one: Any, other: Any) -> Any:
    """Return the type that fits values of both types: Json (an object with any keys) if one of the two is."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            key: _joint_type(one.get(key, other.get(key)), other.get(key, one.get(key)))
            for key in one | other
        }
    if isinstance(one, List) and isinstance(other, List):
        return List(_joint_type(one.feature, other.feature))
    if Json in (type(one), type(other)):
        return Json()
    schemas = [Features(each=each).arrow_schema.remove_metadata() for each in (one, other)]
    return Features.from_arrow_schema(pyarrow.unify_schemas(schemas, promote_options="permissive"))["each"]


def _saved_files(name: str) -> dict[str, list[str]]:
    """Files by split of a folder from `DatasetDict.save_to_disk`, without the caches of `map` in it; or {}."""
    record = Path(name, "dataset_dict.json")
    splits = json.loads(record.read_text())["splits"] if record.is_file() else ()
    folders = {split: Path(name, split) for split in splits}
    states = {split: json.loads((folder / "state.json").read_text()) for split, folder in folders.items()}
    return {
        split: [glob.escape(str(folder / file["filename"])) for file in states[split]["_data_files"]]
        for split, folder in folders.items()
    }


def _with_validation(splits: Splits, fraction: float) -> Splits:
    """Take this share of the training rows, drawn at random, for validation; both splits keep their order.

    The draw is always the same, so that runs with different seeds can be compared, and their weights averaged.
    """
    if "validation" in splits:
        raise DataError(
            "data.validation_fraction: the rows have a validation split of their own; remove the setting"
        )
    train = splits["train"]
    count = int(share_of(len(train), fraction))
    if count == 0:
        raise DataError(
            f"data.validation_fraction: {fraction} of {len(train)} rows is no row; set a larger fraction"
        )
    drawn = np.random.default_rng(0).permutation(len(train))
    logger.info("validation rows: %d of %d, taken from train at random", count, len(train))
    return {
        "train": train.select(np.sort(drawn[count:])),
        "validation": train.select(np.sort(drawn[:count])),
        **{name: rows for name, rows in splits.items() if name != "train"},
    }
