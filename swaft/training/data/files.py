"""Readers for parquet, csv, tsv, json and jsonl: every row of a file, or an error that gives the line.

Error messages continue after the file's name. What is made of rows in files is cached next to them.
"""

from __future__ import annotations

import csv
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets.config
import pandas
import transformers
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from filelock import FileLock

from swaft.errors import DataError, one_line

logger = logging.getLogger(__name__)

MEND_QUOTES = (
    "double the quotation marks inside a text and put the text in quotation marks, or save the file as tsv "
    "(which has no quoting), jsonl or parquet"
)
LARGEST_PIECE = 2**28
"""Bytes of the largest json file that is read in one piece, which takes six times its size in memory."""
HEAD = 4096
"""Characters of a json file that show whether its rows are inside an object: `{"version": ..., "data": [...]}`."""


def cause(error: BaseException) -> str:
    """Return the type and message of the root cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)[:300]}"


@cache
def reading_code() -> str:
    """Return what changes with the code that reads and tokenizes rows: nothing cached outlives it."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return Hasher.hash([transformers.__version__, *(source.read_bytes() for source in sources)])


@contextmanager
def alone(lock: Path) -> Iterator[bool]:
    """Let the ranks of a machine in one by one, and tell whether the lock is held.

    Not every cache can be written to, and not every file system has locks; then all go in at once.
    """
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except (OSError, NotImplementedError) as error:
        logger.info("%s cannot be locked (%s)", lock, error)
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def map_rows(split: Dataset, function: Callable[..., dict[str, list[Any]]], workers: int | None) -> Dataset:
    """Return the columns that a function makes of batches of rows and of their numbers.

    For rows in a file they go into the cache of `datasets`: of the ranks of a machine the first writes them, the
    others wait and read.

    Args:
        split: the rows.
        function: takes a batch of rows, a list per column, and their numbers. The cache is named by all that it
            holds, and workers receive it, so it should hold little.
        workers: processes to use (`data.preprocessing_num_workers`); None: this one. If they cannot receive the
            function, a warning says so, and this one is used.
    """
    try:
        name = Hasher.hash((reading_code(), split._fingerprint, function))
    except Exception as error:  # of any type: it comes from the tokenizer
        if workers is not None:
            logger.warning(
                "one process tokenizes the rows: others cannot receive the tokenizer (%s)", cause(error)
            )
        name = workers = None  # there is nothing for others to read
    files = split.cache_files if name is not None else []
    with alone(Path(files[0]["filename"]).with_name(f"cache-{name}.lock")) if files else nullcontext():
        return split.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=split.column_names,
            num_proc=workers,
            new_fingerprint=name,
        )


def require_utf8(path: str) -> None:
    """Refuse a text file in another encoding; the error gives the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f", line {number}: byte {line[error.start]:#04x} is not UTF-8 (it may be cp1252 or "
                    "UTF-16); save the file as UTF-8"
                ) from error


def _read_table(path: str, *, delimiter: str, quoting: int) -> Dataset:
    """Read a csv or tsv file; what pandas makes of it stays in the cache of `datasets`, not in memory."""
    expected = _count_rows(path, delimiter, quoting)
    if not expected:
        raise DataError(" has no rows")
    found = os.stat(path)
    key = (os.path.realpath(path), found.st_size, found.st_mtime_ns, delimiter, quoting)
    name = Hasher.hash((*key, pandas.__version__, reading_code()))
    file = Path(datasets.config.HF_DATASETS_CACHE, "swaft", f"{name}.arrow")
    with alone(file.with_suffix(".lock")) as writable:
        if not writable:
            return _cells(path, delimiter, quoting, expected)
        if not file.exists():
            cells = _cells(path, delimiter, quoting, expected).with_format("arrow")
            cells.map(
                lambda rows: rows,
                batched=True,
                features=cells.features,
                cache_file_name=str(file),
                new_fingerprint=name,
            )
    return Dataset.from_file(str(file))


def _cells(path: str, delimiter: str, quoting: int, expected: int) -> Dataset:
    """Return the rows of a table as pandas reads them."""
    # A text may well be "NA" or "null"; only an empty cell is missing. The type of a column has to fit all its
    # cells: if read in chunks, as `Dataset.from_csv` does, a chunk of only numbers would turn 007 into 7.
    # Whole numbers stay whole, whatever their size, if a cell is empty: hence the nullable types.
    cells = pandas.read_csv(
        path,
        sep=delimiter,
        quoting=quoting,
        keep_default_na=False,
        na_values=[""],
        low_memory=False,
        dtype_backend="numpy_nullable",
    )
    if len(cells) != expected:
        raise DataError(f": {len(cells)} rows were read, but it has {expected}; save it as jsonl or parquet")
    return Dataset.from_pandas(cells, preserve_index=False)


def _count_rows(path: str, delimiter: str, quoting: int) -> int:
    """Return how many rows a table has, read strictly.

    Raises:
        DataError: unbalanced quotation marks, or ones that swallow rows; a row with more cells than the header; a
            header that another delimiter would split.
    """
    rows = _strict_rows(path, delimiter, quoting)
    _, _, header = next(rows, (0, [], ["", ""]))
    _refuse_other_delimiter(header, delimiter)
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f": the header has two columns {name!r}; give each a name of its own")
    count, quoted = 0, 0
    long: dict[int, tuple[list[list[str]], list[int]]] = {}
    for number, lines, cells in rows:
        if len(cells) > len(header):
            raise DataError(
                f", line {number}: has {len(cells)} cells where the header has {len(header)}; put a cell that "
                f"contains {delimiter!r} in quotation marks, or set another delimiter with data.delimiter"
            )
        if len(lines) > 1 and (split := _as_rows(lines, delimiter, len(header))):
            long[number] = split, [place for place, cell in enumerate(cells) if len(cell.splitlines()) < 2]
        count += 1
        quoted += quoting == csv.QUOTE_NONE and any(map(_is_quoted, cells))
    if long:
        _refuse_swallowed_rows(path, delimiter, long)
    if quoted:
        logger.warning(
            "%s: %d rows have a cell in quotation marks, which are kept: a tsv has no quoting; for a file with "
            "quoting use the ending .csv and data.delimiter=tab",
            *(path, quoted),
        )
    return count


def _strict_rows(path: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield each row that is not a blank line: the number of its first line, its lines, its cells."""
    csv.field_size_limit(2**31 - 1)
    lines: list[str] = []  # lines of the current row
    # A line of only delimiters is a row without texts, to pandas too.
    blank = " \t\r\n".replace(delimiter, "")
    first = 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        kept = (lines.append(line) or line for line in file)
        reader = csv.reader(kept, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for cells in reader:
                if any(line.strip(blank) for line in lines):
                    yield first, lines.copy(), cells
                lines.clear()
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f", line {first}: quotation marks do not pair ({error}); {MEND_QUOTES}"
            ) from error


def _as_rows(lines: list[str], delimiter: str, cells: int) -> list[list[str]]:
    """Split each line, ignoring quotation marks; [] if one is not a row, as in the paragraphs of a text.

    Those have any number of commas, followed by white space.
    """
    split = [line.rstrip("\r\n").split(delimiter) for line in lines]
    are_rows = (
        len(row) == cells and all(cell and not cell[0].isspace() for cell in row[1:]) for row in split
    )
    return split if cells > 1 and all(are_rows) else []


def _refuse_swallowed_rows(
    path: str, delimiter: str, long: Mapping[int, tuple[list[list[str]], list[int]]]
) -> None:
    """Refuse a row over several lines if each line has, in a column other than the text's, a value of other rows.

    Args:
        path: path of a csv file.
        delimiter: its delimiter.
        long: rows whose lines may each be a row, by the number of the first line: the cells of each line, and the
            columns whose cell is on one line.
    """
    asked = {(at, row[at].strip('"')) for split, beside in long.values() for row in split for at in beside}
    single = (
        cells for _, lines, cells in _strict_rows(path, delimiter, csv.QUOTE_MINIMAL) if len(lines) == 1
    )
    known = {each for cells in single for each in enumerate(cells) if each in asked}
    for number, (split, beside) in long.items():
        if any(all((at, row[at].strip('"')) in known for row in split) for at in beside):
            raise DataError(
                f", line {number}: a quotation mark opens a cell that runs over {len(split)} lines, but each "
                f"looks like a row of its own; {MEND_QUOTES}"
            )
    logger.warning(
        "%s: %d texts run over several lines, each with as many cells as a row (the first begins in line %d); if "
        "these lines are rows, %s",
        *(path, len(long), min(long), MEND_QUOTES),
    )


def _is_quoted(cell: str) -> bool:
    """Whether a cell looks like a text with quotation marks that a csv writer has quoted."""
    inner = cell[1:-1]
    return cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def _refuse_other_delimiter(header: list[str], delimiter: str) -> None:
    if len(header) > 1:
        return
    for other in (";", "\t", "|", ","):
        if other in header[0]:
            said = "tab" if other == "\t" else other
            raise DataError(
                f": the header {header[0]!r} is one column, split at {delimiter!r}; set data.delimiter='{said}'"
            )


def _read_json(path: str, features: Features | None = None) -> Dataset:
    """Read json lines, a list of rows, or an object whose `data` holds the rows: flat ones, or SQuAD's articles.

    Columns have the types of `features`; None: they are inferred from the values.
    """
    rows = None
    with open(path, encoding="utf-8-sig") as file:
        if re.match(r'\s*\{.*?"data"\s*:\s*\[', file.read(HEAD), re.DOTALL):
            file.seek(0)
            with suppress(ValueError, KeyError):  # json lines with a column `data`, or a nested `data`
                rows = json.load(file)["data"]
    if rows is None:
        # A later chunk would be cast to the types of the first, with its texts written as json if they differ. So
        # there is one chunk, or an error. Rows with an id, a source and a model would be read as an agent's traces.
        size = os.path.getsize(path)
        options: dict[str, Any] = {"features": features, "parse_agent_traces": False}
        options |= {"on_mixed_types": None} if size > LARGEST_PIECE else {"chunksize": max(1, size)}
        try:
            read = Dataset.from_json(glob.escape(path), **options)
        except DatasetGenerationError as error:
            if size <= LARGEST_PIECE:
                raise
            raise DataError(
                f" is larger than {LARGEST_PIECE >> 20} MB, so all its rows need the columns and types of the "
                f"first rows ({cause(error)}); write parquet, or several files in a folder (data.dataset_name)"
            ) from error
    elif not all(isinstance(row, dict) for row in rows):
        raise DataError(": its data are not objects; expected one object per row, keyed by column name")
    else:
        read = Dataset.from_dict(
            {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))},
            features,
        )
    return Dataset.from_list(list(_questions(read))) if "paragraphs" in read.column_names else read


def _questions(articles: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the questions of SQuAD's official files, 1.1 and 2.0, in the hub's form: one per row."""
    for number, article in enumerate(articles.to_list(), start=1):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = question["answers"]
                    yield {
                        "id": question["id"],
                        "title": article.get("title") or "",
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
        except (KeyError, TypeError) as error:
            raise DataError(
                f": article {number} of its data is not as in SQuAD's files ({cause(error)}); expected paragraphs "
                "of context and qas, each of id, question and answers (text, answer_start)"
            ) from error


TABLES = {
    # GLUE's files and similar ones have no quoting: a quotation mark is part of its text.
    ".tsv": partial(_read_table, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".csv": partial(_read_table, delimiter=",", quoting=csv.QUOTE_MINIMAL),
}
# These readers use no network; `load_dataset` reports every call to the hub, even for local files.
FILE_READERS: dict[str, Callable[..., Dataset]] = {
    ".parquet": lambda path: Dataset.from_parquet(glob.escape(path)),  # from_parquet expands patterns
    **TABLES,
    ".json": _read_json,
    ".jsonl": _read_json,
}
