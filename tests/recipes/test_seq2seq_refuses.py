from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_inputs import save_model
from tiny_texts import language_tokenizer, save_encoder_decoder
from transformers import MarianConfig

from swaft.training.checks import Problems
from swaft.training.config import load_config

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def refuse(refusal, seq2seq, text_inputs):
    """Call the recipe with overrides, see it fail in words, and return the words."""
    return partial(refusal, seq2seq, text_inputs)


def pretrained(folder: str | Path) -> tuple[str, ...]:
    return ("model.config=null", "model.vocab_size=null", f"model.model_name_or_path={folder}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.source_column=source", "data.target_column=traget"), "Did you mean 'target'?"),
        (("data.source_lang=en", "data.target_lang=fr"), "data.source_lang"),
        (("eval.metric=squad",), "squad does not fit a generation task"),
        (("eval.metric=chfr",), "Did you mean 'chrf'?"),
        (("model.config=null",), "no model named"),
        (("model.model_name_or_path=t5-small",), "keep one"),
        (("model.config={d_model: 8}",), "has no model_type"),
        (("model.config={model_type: t6}",), "there is no model_type 't6'"),
        (("model.config={model_type: bert}",), "bert is not an encoder-decoder"),
        (("train.label_smoothing=0.1",), "Did you mean 'train.label_smoothing_factor'?"),
    ],
)
def test_a_setting_that_cannot_work_is_named(refuse, overrides, expected):
    assert expected in refuse(*overrides)


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ((), "rouge"),
        (("data.source_prefix=translate English to German: ",), "bleu_chrf"),
        (("data.source_lang=de_DE", "data.target_lang=de_DE"), "rouge"),
        (("data.source_lang=en_XX", "data.target_lang=de_DE"), "bleu_chrf"),
        (("eval.metric=chrf",), "chrf"),
        (("model.config={model_type: marian}",), "bleu_chrf"),
    ],
)
def test_translations_are_scored_by_bleu_and_chrf_unless_told_otherwise(
    seq2seq, text_inputs, settings, metric
):
    given = ["--config", str(text_inputs / "run.yaml"), "eval.metric=auto", *settings]
    assert seq2seq.prepare(load_config(seq2seq.Config, given), Problems()).metric.name == metric


@pytest.mark.parametrize("column", ["translation", "plain"])
def test_bleu_follows_the_language_of_the_rows_or_of_the_settings(seq2seq, text_inputs, tmp_path, column):
    texts = {"en": "we are all glad", "zh": "我们都很高兴见到你们"}
    row = (
        {"translation": texts} if column == "translation" else {"source": texts["en"], "target": texts["zh"]}
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    given = [f"data.{split}_file={rows}" for split in ("train", "validation", "test")]
    given += ["data.source_lang=en", "data.target_lang=zh", "eval.metric=auto"]
    problems = Problems()
    config = load_config(seq2seq.Config, ["--config", str(text_inputs / "run.yaml"), *given])
    metric = seq2seq.prepare(config, problems).metric
    assert problems.found == []
    assert metric.compute([texts["zh"]], [[texts["zh"]]]).scores["bleu"] == pytest.approx(100)


def test_a_score_that_there_is_not_is_named_before_the_model_is_loaded(refuse):
    new = "model.config={model_type: t5, num_layer: 1}"
    said = refuse("averaging.rule=windows", "eval.metric_for_best_model=f2", new)
    assert "this run has no score 'f2'" in said
    assert "Did you mean 'num_layers'?" in said


def test_rows_that_cannot_be_used_are_named(refuse, tmp_path):
    Dataset.from_dict({"source": ["a cat", "a dog"], "target": ["chat", None]}).to_csv(tmp_path / "test.csv")
    assert "row 2 of test has nothing in column 'target'" in refuse(f"data.test_file={tmp_path / 'test.csv'}")


@pytest.mark.parametrize(
    ("languages", "said"),
    [
        (("data.source_lang=en", "data.target_lang=fr_XX"), "has no language 'en'; did you mean en_XX?"),
        ((), "data.source_lang: MBartTokenizer has no language None; expected one of ar_AR"),
    ],
)
def test_a_model_of_many_languages_has_to_be_told_which(refuse, tmp_path, languages, said):
    language_tokenizer("mbart").save_pretrained(tmp_path / "tokenizer")
    assert said in refuse(
        "model.vocab_size=null", f"model.tokenizer_name={tmp_path / 'tokenizer'}", *languages
    )


def test_a_tokenizer_with_neither_padding_nor_an_end_is_refused(refuse, tmp_path):
    folder = save_encoder_decoder(tmp_path / "model", special={"unk_token": "<unk>"})
    assert "has no padding token" in refuse(*pretrained(folder))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="the package is there")
def test_a_tokenizer_that_needs_a_package_names_it(refuse, tmp_path):
    config = MarianConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1, pad_token_id=0)
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    said = refuse(*pretrained(tmp_path / "model"))
    assert "cannot be loaded: MarianTokenizer requires the SentencePiece library" in said


def test_a_decoder_that_does_not_know_where_to_start_is_refused(refuse, tmp_path):
    folder = save_encoder_decoder(tmp_path / "model", decoder_start_token_id=None)
    assert "the model has no decoder_start_token_id" in refuse(*pretrained(folder))


def test_an_encoder_is_refused(refuse, tmp_path):
    folder = save_model(tmp_path / "bert")
    assert "model.model_name_or_path: bert is not an encoder-decoder" in refuse(*pretrained(folder))


def test_a_pretrained_encoder_decoder_is_fine_tuned_with_its_own_tokenizer(
    seq2seq, text_inputs, tmp_path, capsys
):
    folder, output = save_encoder_decoder(tmp_path / "model"), tmp_path / "run"
    code = seq2seq.main(
        [
            *("--config", str(text_inputs / "run.yaml"), f"train.output_dir={output}", "train.max_steps=2"),
            *pretrained(folder),
            *("eval.predict_with_generate=false", "eval.metric=auto", "eval.num_beams=null"),
            *(
                "eval.max_new_tokens=null",
                "averaging.rule=windows",
                "averaging.start=0",
                "averaging.blocks=2",
            ),
        ]
    )
    assert code == 0, capsys.readouterr().err
    own, saved = (Path(where) / "tokenizer.json" for where in (folder, output / "final"))
    assert own.read_text() == saved.read_text()
    assert not (output / "samples-validation.jsonl").exists()  # nothing was generated
    assert '"metric": "loss"' in (output / "summary.json").read_text()


def test_a_tokenizer_without_padding_pads_with_its_end(seq2seq, text_inputs, tmp_path, capsys):
    """The model's own padding, id 0, is a word to this tokenizer: no text may end in it."""
    folder = save_encoder_decoder(tmp_path / "model", special={"eos_token": "</s>", "unk_token": "<unk>"})
    output = tmp_path / "run"
    code = seq2seq.main(
        [
            *("--config", str(text_inputs / "run.yaml"), f"train.output_dir={output}", "train.max_steps=30"),
            *pretrained(folder),
        ]
    )
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (output / "samples-validation.jsonl").read_text().splitlines()]
    assert any(row["last"] for row in rows)
    assert not any("<pad>" in row["last"] + row["averaged"] for row in rows)
