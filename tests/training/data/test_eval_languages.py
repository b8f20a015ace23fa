"""Rows of further languages are found beside those of the training language, and have splits of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from swaft.errors import ConfigError, DataError
from swaft.training.config import load_config
from swaft.training.data import sources
from swaft.training.data.classification import ClassificationConfig, DataConfig
from swaft.training.data.sources import language_groups, load_splits

pytestmark = pytest.mark.unit

FEATURES = Features(
    {
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": ClassLabel(names=["entailment", "neutral", "contradiction"]),
    }
)


def rows(word: str, count: int = 3) -> Dataset:
    columns = {
        "premise": [f"{word} {row}" for row in range(count)],
        "hypothesis": [word] * count,
        "label": [0, 1, 2][:count],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def first_words(splits: dict[str, Dataset]) -> dict[str, str]:
    return {name: split["premise"][0] for name, split in splits.items()}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    for name, word in {
        "train": "en",
        "validation": "en",
        "validation.xx": "xx",
        "test": "en",
        "test.xx": "xx",
        "test.yy": "yy",
    }.items():
        rows(word).to_csv(str(tmp_path / f"{name}.csv"))
    return {f"{split}_file": str(tmp_path / f"{split}.csv") for split in ("train", "validation", "test")}


EXPECTED = {
    "train": "en 0",
    "validation": "en 0",
    "test": "en 0",
    "validation_xx": "xx 0",
    "test_xx": "xx 0",
    "test_yy": "yy 0",
}


def test_files_of_a_language_lie_beside_those_of_the_training_language(files):
    data = DataConfig(**files, eval_languages="xx, yy", max_predict_samples=2, max_eval_samples=1)
    splits = load_splits(data)
    assert first_words(splits) == EXPECTED
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3,
        "validation": 1,
        "test": 2,
        "validation_xx": 1,
        "test_xx": 2,
        "test_yy": 2,
    }
    assert language_groups(splits, data) == {
        "validation_mean": ["validation", "validation_xx"],
        "test_mean": ["test", "test_xx", "test_yy"],
    }


def test_a_task_folder_holds_a_file_for_each_language(tmp_path, monkeypatch):
    monkeypatch.setenv("SWAFT_DATA", str(tmp_path))
    (tmp_path / "nli").mkdir()
    for name, word in {"train": "en", "test": "en", "test.xx": "xx"}.items():
        rows(word).to_parquet(str(tmp_path / "nli" / f"{name}.parquet"))
    splits = load_splits(DataConfig(task_name="nli", eval_languages="xx"))
    assert first_words(splits) == {"train": "en 0", "test": "en 0", "test_xx": "xx 0"}


def test_a_dataset_of_the_hub_has_a_configuration_for_each_language(tmp_path):
    """A folder laid out as facebook/xnli is, which `load_dataset` reads as it reads the hub."""
    configurations = []
    for language in ("en", "xx"):
        (tmp_path / language).mkdir()
        for split in ("train", "validation", "test"):
            rows(language).to_parquet(str(tmp_path / language / f"{split}-00000-of-00001.parquet"))
        paths = "".join(
            f"  - {{split: {split}, path: {language}/{split}-*}}\n"
            for split in ("train", "validation", "test")
        )
        configurations.append(f"- config_name: {language}\n  data_files:\n{paths}")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    data = DataConfig(dataset_name=str(tmp_path), dataset_config_name="en", eval_languages="xx")
    splits = load_splits(data)
    assert first_words(splits) == {name: word for name, word in EXPECTED.items() if name != "test_yy"}
    assert splits["test_xx"].features["label"].names == FEATURES["label"].names


def test_a_language_without_rows_is_named(files):
    with pytest.raises(DataError, match=r"for 'zz' there are neither .* \(test\.csv, test\.zz\.csv\)"):
        load_splits(DataConfig(**files, eval_languages="xx,zz"))


def test_a_language_that_the_hub_does_not_have_is_named(monkeypatch):
    def load(name, config_name):
        if config_name == "zz":
            raise ValueError("BuilderConfig 'zz' not found")
        return DatasetDict({"train": rows("en")})

    monkeypatch.setattr(sources, "load_dataset_builder", lambda *_: SimpleNamespace(name="parquet"))
    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(DataError, match=r"some/xnli \(zz\) cannot be loaded .* 'zz' not found"):
        load_splits(DataConfig(dataset_name="some/xnli", dataset_config_name="en", eval_languages="zz"))


def test_without_further_languages_there_is_no_mean(files):
    data = DataConfig(**files)
    assert language_groups(load_splits(data), data) == {}


@pytest.mark.parametrize(
    ("languages", "said"),
    [("de,,fr", "empty or a repeated name"), ("de,de", "repeated"), ("en,de", "remove it")],
)
def test_languages_that_cannot_be_meant_are_refused(tmp_path, languages, said):
    arguments = [
        *("model.model_name_or_path=demo", f"train.output_dir={tmp_path / 'run'}"),
        *(
            "data.dataset_name=facebook/xnli",
            "data.dataset_config_name=en",
            f"data.eval_languages={languages}",
        ),
    ]
    with pytest.raises(ConfigError, match=f"data.eval_languages: .*{said}"):
        load_config(ClassificationConfig, arguments)


def test_a_new_source_of_rows_drops_the_languages_of_the_old_one():
    xnli = Path(__file__).parents[3] / "recipes/configs/classification/xnli.yaml"
    config = load_config(ClassificationConfig, ["--config", str(xnli), "data.task_name=mrpc"])
    assert config.data.eval_languages is None


def test_files_of_a_language_have_the_delimiter_of_the_others(tmp_path):
    for name in ("train", "test", "test.de"):
        (tmp_path / f"{name}.csv").write_text(f"text;label\n{name};0\nb;1\n")
    splits = load_splits(
        DataConfig(
            train_file=str(tmp_path / "train.csv"),
            test_file=str(tmp_path / "test.csv"),
            delimiter=";",
            eval_languages="de",
        )
    )
    assert splits["test_de"]["text"][0] == "test.de"
