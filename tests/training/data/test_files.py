"""A file gives every row its writer wrote, or the error names the line."""

from __future__ import annotations

import json
import logging

import datasets
import pandas
import pytest

from swaft.errors import DataError
from swaft.training.data.classification import DataConfig
from swaft.training.data.sources import load_splits

pytestmark = pytest.mark.unit

SAID = [f"he said number {i}" for i in range(100)]


@pytest.fixture
def read(tmp_path):
    """Write a text as a file and return the rows that are read of it."""

    def call(name: str, text: str | bytes, delimiter: str | None = None) -> list[dict]:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_splits(DataConfig(train_file=str(tmp_path / name), delimiter=delimiter))[
            "train"
        ].to_list()

    return call


def table(delimiter: str, texts: list[str]) -> str:
    lines = [
        delimiter.join(("text", "label")),
        *(f"{text}{delimiter}{i % 2}" for i, text in enumerate(texts)),
    ]
    return "\n".join(lines) + "\n"


def test_a_quotation_mark_in_a_tsv_belongs_to_its_text(read):
    texts = [('"' if i in (10, 40) else "") + text for i, text in enumerate(SAID)]
    rows = read("a.tsv", table("\t", texts))
    assert rows == [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def test_a_tsv_that_is_quoted_after_all_is_read_as_it_is_and_said(read, caplog):
    with caplog.at_level(logging.WARNING, logger="swaft"):
        [row] = read("a.tsv", 'text\tlabel\n"so ""they"" say"\t1\n')
    assert row["text"] == '"so ""they"" say"'
    assert "1 rows have a cell in quotation marks" in caplog.text
    assert "data.delimiter=tab" in caplog.text
    assert read("a.csv", 'text\tlabel\n"so ""they"" say"\t1\n', "tab")[0]["text"] == 'so "they" say'


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ('"{}', "{}", "line 12: quotation marks do not pair"),  # open to the end of the file
        ('"{}', '"{}', "line 12: quotation marks do not pair"),  # closed before the second's words
        (
            '"{}',
            '{}"',
            "line 12: a quotation mark opens a cell that runs over 31 lines, but each looks like a row",
        ),
    ],
)
def test_a_csv_whose_quotation_marks_would_swallow_rows_is_refused(read, first, second, said):
    texts = list(SAID)
    texts[10], texts[40] = first.format(texts[10]), second.format(texts[40])
    with pytest.raises(DataError, match=rf"data\.train_file: .*a\.csv, {said}.*save the file as tsv"):
        read("a.csv", table(",", texts))


def test_texts_of_several_paragraphs_with_commas_are_read(read):
    texts = [
        "Dear all,\nthank you, and\n\ngood bye",
        'He said "so, then",\nand went',
        "one, two\nthree",
        "x" * 200_000,
    ]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    assert [row["text"] for row in read("a.csv", table(",", quoted))] == texts


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("text", ("one line\nand another",)),
        ("text,label", ("I paid 1,000 dollars.\nNever again", "0")),
        ("text,label", ("great phone,bad battery\nwould not buy", "0")),
        ("label,text", ("0", "line one\nline 1,000 two")),
    ],
)
def test_a_text_whose_lines_have_as_many_commas_as_a_row_is_read(read, header, row):
    quoted = ",".join(f'"{cell}"' if "\n" in cell else cell for cell in row)
    names = header.split(",")
    others = [",".join("0" if name == "label" else word for name in names) for word in ("a", "b")]
    rows = read("a.csv", "\n".join([header, quoted, *others]) + "\n")
    assert rows[0] == {
        name: int(cell) if name == "label" else cell for name, cell in zip(names, row, strict=True)
    }
    assert len(rows) == 3


def test_swallowed_rows_are_found_by_one_column_whose_values_repeat(read):
    lines = [
        f"{i},{'on' if i != 3 else chr(34)}e {i},{'x' if i != 5 else 'x' + chr(34)},{i % 2}" for i in range(9)
    ]
    with pytest.raises(DataError, match="line 5: a quotation mark opens a cell that runs over 3 lines"):
        read("a.csv", "\n".join(["id,text,pair,label", *lines]) + "\n")


def test_a_line_of_tabs_alone_is_a_row_without_a_text(read):
    rows = read("a.tsv", "text\tlabel\na\t0\n\t\nb\t1\n\n")
    assert [row["text"] for row in rows] == ["a", None, "b"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text,label\na,0\nb, c,1\n", "line 3: has 3 cells where the header has 2"),
        (
            "a.csv",
            "text,label\na,0,\nb,1,\n",
            "line 2: has 3 cells",
        ),  # pandas took the first column for an index
        ("a.tsv", "text\tlabel\na\tb\t1\n", "line 2: has 3 cells"),
        ("a.csv", "text;label\na, b;0\n", "the header 'text;label' is one column.*set data.delimiter=';'"),
        ("a.csv", "text\tlabel\na\t0\n", "set data.delimiter='tab'"),
    ],
)
def test_cells_that_do_not_fit_the_header_are_named(read, name, text, said):
    with pytest.raises(DataError, match=said):
        read(name, text)


def test_another_delimiter_can_be_named(read):
    assert read("a.csv", "text;label\na, b;0\n", ";") == [{"text": "a, b", "label": 0}]


def test_blank_lines_are_no_rows_and_a_missing_cell_is_nothing(read):
    rows = read("a.csv", "text,label\n\na,3\n   \nb,\n")
    assert rows == [{"text": "a", "label": 3}, {"text": "b", "label": None}]
    assert type(rows[0]["label"]) is int
    assert read("a.csv", "text,label\na,3.0\nb,\n")[0]["label"] == 3.0


def test_a_whole_number_keeps_every_digit_beside_an_empty_cell(read):
    rows = read("a.csv", f"text,id\na,{2**53 + 1}\nb,\nc,-7\n")
    assert [row["id"] for row in rows] == [2**53 + 1, None, -7]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\nplain,0\ncaf\xe9,1\n"),
        ("a.tsv", "text\tlabel\nplain\t0\ncaf\xe9\t1\n"),
        ("a.jsonl", '\n{"text": "plain"}\n{"text": "caf\xe9"}\n'),
        ("a.json", '[\n{"text": "plain"},\n{"text": "caf\xe9"}]\n'),
    ],
)
def test_a_file_of_another_encoding_is_refused_with_its_line(read, name, text):
    with pytest.raises(DataError, match=r"line 3: byte 0xe9 is not UTF-8 .* save the file as UTF-8"):
        read(name, text.encode("cp1252"))
    with pytest.raises(DataError, match=r"line 1: byte 0xff is not UTF-8"):
        read(name, text.encode("utf-16"))


def test_two_columns_of_one_name_are_refused(read):
    with pytest.raises(DataError, match=r"a\.csv: the header has two columns 'label'"):
        read("a.csv", "text,label,label\na,1,0\n")


def squad(*questions: dict) -> str:
    return json.dumps(
        {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "a b", "qas": questions}]}]}
    )


def test_the_official_files_of_squad_are_read_as_the_hub_has_them(read):
    first = {
        "id": "1",
        "question": "q?",
        "answers": [{"text": "b", "answer_start": 2}, {"text": "a b", "answer_start": 0}],
    }
    second = {
        "id": "2",
        "question": "r?",
        "is_impossible": True,
        "answers": [],
        "plausible_answers": [{"text": "a", "answer_start": 0}],
    }
    both = {"title": "T", "context": "a b"}
    assert read("a.json", squad(first, second)) == [
        both | {"id": "1", "question": "q?", "answers": {"text": ["b", "a b"], "answer_start": [2, 0]}},
        both | {"id": "2", "question": "r?", "answers": {"text": [], "answer_start": []}},
    ]
    with pytest.raises(
        DataError, match=r"article 1 of its data is not as in SQuAD's files \(KeyError: 'question'\)"
    ):
        read("a.json", squad({"id": "1", "answers": []}))


def test_articles_of_squad_are_read_as_a_bare_list_and_as_lines_too(read):
    question = {"id": "1", "question": "q?", "answers": [{"text": "b", "answer_start": 2}]}
    official = squad(question, question | {"id": "2", "answers": []})
    articles = json.loads(official)["data"] * 2
    expected = read("a.json", official) * 2
    assert read("b.json", json.dumps(articles)) == expected
    assert read("c.jsonl", "\n".join(map(json.dumps, articles))) == expected


def test_rows_in_an_object_are_read_and_a_column_of_that_name_is_none(read):
    assert read("a.json", '{"data": [{"text": "a"}, {"text": "b", "label": 1}]}') == [
        {"text": "a", "label": None},
        {"text": "b", "label": 1},
    ]
    assert read("b.json", '{"data": ["x"]}\n{"data": ["y"]}\n') == [{"data": ["x"]}, {"data": ["y"]}]


def test_a_column_has_one_type_however_many_rows_there_are(read):
    texts = [f"w{i}" for i in range(10_000)] + ["007", "1.50"]
    assert [row["text"] for row in read("rows.csv", table(",", texts))] == texts
    scores = read("scores.csv", "text,label\n" + "a,1\n" * 10_000 + "a,0.5\n")
    assert [row["label"] for row in scores[-2:]] == [1.0, 0.5]


def test_a_text_of_a_json_file_of_several_chunks_is_as_written_whatever_stands_beside_it(read, monkeypatch):
    written = [{"text": "x" * 1_000, "label": "pos"}] * 11_000 + [{"text": "x", "label": 3}]
    lines = [json.dumps(row) for row in written]
    assert {row["label"] for row in read("a.jsonl", "\n".join(lines))} == {"pos", 3}
    monkeypatch.setattr("swaft.training.data.files.LARGEST_PIECE", 0)  # as if too large for one piece
    assert read("a.jsonl", "\n".join(lines[:-1])) == written[:-1]
    said = r"is larger than 0 MB, .* \(.*Column\(/label\) changed from string to number.*data\.dataset_name"
    with pytest.raises(DataError, match=said):
        read("b.jsonl", "\n".join(lines))


def test_chats_with_an_id_a_source_and_a_model_are_no_traces_of_an_agent(read):
    chat = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [{"role": "user"}]}
    assert read("a.jsonl", json.dumps(chat)) == [chat]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_is_parsed_once_and_its_rows_stay_in_a_file(read, name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text, parsed, read_csv = table("," if name == "a.csv" else "\t", SAID), [], pandas.read_csv
    monkeypatch.setattr(pandas, "read_csv", lambda *a, **options: parsed.append(a) or read_csv(*a, **options))
    first = read(name, text)
    found = load_splits(DataConfig(train_file=str(tmp_path / name)))["train"]
    assert found.to_list() == first
    assert [file["filename"].startswith(str(tmp_path / "cache")) for file in found.cache_files] == [True]
    assert len(parsed) == 1
    assert read(name, text.replace("number 7,", "number 8,").replace("number 7\t", "number 8\t")) != first
    assert len(parsed) == 2


def test_without_a_cache_to_write_to_a_table_is_read_all_the_same(read, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file, where the folder of the cache should be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "taken")
    rows = read("a.csv", table(",", SAID))
    assert rows == [{"text": text, "label": i % 2} for i, text in enumerate(SAID)]
