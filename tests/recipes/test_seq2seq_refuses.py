from __future__ import annotations

from pathlib import Path

import pytest
from tiny_inputs import save_model
from tiny_texts import save_encoder_decoder, save_pairs

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture
def refuse(seq2seq, text_inputs, tmp_path, capsys):
    """Call the recipe with overrides, see it fail in words, and return the words."""

    def call(*overrides: str) -> str:
        output = tmp_path / "run"
        arguments = ["--config", str(text_inputs / "run.yaml"), f"train.output_dir={output}", *overrides]
        code = seq2seq.main(arguments)
        said = capsys.readouterr()
        assert code == 1
        assert said.err.count("error: ") == 1
        assert "Traceback" not in said.err
        assert "step 1/" not in said.out
        assert not (output / "final").exists()
        return said.err

    return call


def pretrained(folder: str | Path) -> tuple[str, ...]:
    return ("model.config=null", "model.vocab_size=null", f"model.model_name_or_path={folder}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.source_column=source",), "data.target_column: is not set"),
        (("data.source_column=source", "data.target_column=traget"), "Did you mean 'target'?"),
        (("data.source_lang=en", "data.target_lang=fr"), "data.source_lang"),
        (("eval.metric=accuracy",), "accuracy does not fit a generation task"),
        (("eval.metric=chfr",), "Did you mean 'chrf'?"),
        (("eval.predict_with_generate=false",), "eval.num_beams: 2 is about generated texts"),
        (("train.label_smoothing_factor=1.0",), "train.label_smoothing_factor"),
        (("model.config=null",), "no model named"),
        (("model.model_name_or_path=t5-small",), "keep one"),
        (("model.config={d_model: 8}",), "has no model_type"),
        (("model.config={model_type: t6}",), "there is no model_type 't6'"),
        (("model.config={model_type: t5, num_layer: 1}",), "Did you mean 'num_layers'?"),
        (("model.config={model_type: bert}",), "bert is no encoder-decoder"),
        (("model.config={model_type: bart, max_position_embeddings: 16}",), "reads at most 16 tokens"),
        (("noise.sigma=0.1", "noise.kind=none"), "noise.sigma is 0.1, which noise.kind=none does not use"),
        (("train.label_smoothing=0.1",), "Did you mean 'train.label_smoothing_factor'?"),
    ],
)
def test_a_setting_that_cannot_work_is_named(refuse, overrides, expected):
    assert expected in refuse(*overrides)


def test_an_empty_reference_is_named_by_its_row(refuse, tmp_path):
    bad = save_pairs(tmp_path / "bad.csv", 8, seed=1, target=lambda text: " " if "noir" in text else text)
    train = save_pairs(tmp_path / "train.csv", 8, seed=2)
    said = refuse(f"data.train_file={train}", f"data.validation_file={bad}")
    assert "of validation has an empty text in column 'target'" in said


def test_a_decoder_that_does_not_know_where_to_start_is_refused(refuse, tmp_path):
    folder = save_encoder_decoder(tmp_path / "model", decoder_start_token_id=None)
    assert "the model has no decoder_start_token_id" in refuse(*pretrained(folder))


def test_an_encoder_is_refused(refuse, tmp_path):
    folder = save_model(tmp_path / "bert")
    assert "model.model_name_or_path: bert is no encoder-decoder" in refuse(*pretrained(folder))


def test_a_model_that_is_not_there_is_named(refuse):
    assert "model.model_name_or_path: /nowhere/at/all cannot be loaded" in refuse(
        *pretrained("/nowhere/at/all")
    )


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
