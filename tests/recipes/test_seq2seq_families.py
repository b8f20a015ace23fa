"""Every family of encoder-decoders trains and writes; those of many languages write the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_texts import language_tokenizer, save_two_berts
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]

T5_SIZES = "d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2"
BART_SIZES = (
    "d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, decoder_attention_heads: 2, "
    "encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_position_embeddings: 32"
)
FAMILIES = {
    "t5": T5_SIZES,
    "umt5": T5_SIZES,
    "longt5": T5_SIZES,
    "bart": BART_SIZES,
    "pegasus": BART_SIZES,
    "marian": BART_SIZES,
    "blenderbot": BART_SIZES,
    "bigbird_pegasus": f"{BART_SIZES}, block_size: 2, num_random_blocks: 1",  # sparse from 15 tokens on
}
# Tokenizer, type of the model, and the codes of the two languages.
MANY_LANGUAGES = {
    "mbart": ("mbart", "en_XX", "fr_XX"),
    "mbart50": ("mbart", "en_XX", "fr_XX"),
    "nllb": ("m2m_100", "eng_Latn", "fra_Latn"),
}


@pytest.fixture
def train(seq2seq, text_inputs, tmp_path, capsys):
    """Train a new model for a few steps, and return its run folder."""

    def call(*overrides: str) -> Path:
        output = tmp_path / "run"
        code = seq2seq.main(
            [
                *(
                    "--config",
                    str(text_inputs / "run.yaml"),
                    f"train.output_dir={output}",
                    "train.max_steps=3",
                ),
                *("train.learning_rate=1e-3", "train.label_smoothing_factor=0.1", *overrides),
            ]
        )
        assert code == 0, capsys.readouterr().err
        return output

    return call


def of_languages(kind: str, folder: Path) -> tuple[str, ...]:
    """The settings of a new model with a tokenizer of many languages."""
    model_type, source, target = MANY_LANGUAGES[kind]
    language_tokenizer(kind).save_pretrained(folder)
    return (
        f"model.config={{model_type: {model_type}, {BART_SIZES}}}",
        *("model.vocab_size=null", f"model.tokenizer_name={folder}"),
        *(f"data.source_lang={source}", f"data.target_lang={target}"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_generates_and_is_evaluated(train, family):
    output = train(f"model.config={{model_type: {family}, {FAMILIES[family]}}}")
    scores = json.loads((output / "summary.json").read_text())["scores"]["test"]
    for weights in ("last", "averaged"):
        assert {"chrf", "loss", "gen_len"} == set(scores[weights])
    rows = [json.loads(line) for line in (output / "samples-test.jsonl").read_text().splitlines()]
    model = AutoModelForSeq2SeqLM.from_pretrained(output / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    inputs = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, num_beams=2, max_new_tokens=12)
    written = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert written == [row["last"] for row in rows]


def test_two_berts_train_and_end_with_their_separator(train, tmp_path):
    folder = save_two_berts(tmp_path / "berts", decoder_start_token_id=2)
    output = train(f"model.model_name_or_path={folder}", "model.config=null", "model.vocab_size=null")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["num_averaged"] > 0
    for weights in ("final", "final-averaged"):
        model = AutoModelForSeq2SeqLM.from_pretrained(output / weights)
        ends = (model.generation_config.eos_token_id, model.generation_config.decoder_start_token_id)
        assert ends == (3, 2)
        assert model.config.pad_token_id == model.config.decoder.pad_token_id == 0


@pytest.mark.parametrize("kind", MANY_LANGUAGES)
def test_a_model_of_many_languages_writes_the_target_language(train, tmp_path, kind):
    output = train(*of_languages(kind, tmp_path / "tokenizer"))
    for weights in ("final", "final-averaged"):
        model = AutoModelForSeq2SeqLM.from_pretrained(output / weights).eval()
        tokenizer = AutoTokenizer.from_pretrained(output / weights)
        code = tokenizer.convert_tokens_to_ids(MANY_LANGUAGES[kind][2])
        inputs = tokenizer("a red cat", return_tensors="pt")
        labels = torch.tensor([tokenizer(text_target="chat rouge").input_ids])
        assert tokenizer.convert_tokens_to_ids(MANY_LANGUAGES[kind][1]) in inputs.input_ids
        ids = model.generate(**inputs, num_beams=2, max_new_tokens=12)[0].tolist()
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if kind == "mbart":  # its decoder starts with the code, which labels end with
            assert (ids[0], labels[0, -1]) == (code, code)
        else:
            assert (ids[1], labels[0, 0]) == (code, code)
        start = model.config.decoder_start_token_id if shift is None else shift(labels)[0, 0]
        assert ids[0] == start  # generation starts as training did
    for row in map(json.loads, (output / "samples-test.jsonl").read_text().splitlines()):
        assert MANY_LANGUAGES[kind][2] not in row["last"] + row["averaged"]
