"""Runs that train adapters, under the engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_inputs import accuracy_of
from tiny_texts import save_encoder_decoder
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.recipe

LORA = ("model.use_peft=true", "model.lora_r=4", "model.lora_target_modules=all-linear")


def adapted_classifier(base: Path, folder: Path):
    """The base model with the folder's adapter, by nothing but transformers and peft."""
    return PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), folder
    )


def check_classifier(inputs: Path, output: Path) -> None:
    """Hold every folder of a run to the scores that the run reported, and see that its adapter was trained."""
    summary = json.loads((output / "summary.json").read_text())
    base = inputs / "model"
    for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
        saved = load_file(output / folder / "adapter_model.safetensors")
        assert all(weight.any() for name, weight in saved.items() if "lora_B" in name)  # they begin at 0
        for split in ("validation", "test"):
            model = adapted_classifier(base, output / folder)
            score = accuracy_of(output / folder, inputs / f"{split}.csv", model=model)
            assert summary["scores"][split][weights]["accuracy"] == pytest.approx(score), (weights, split)
    best = adapted_classifier(base, output / "best")
    score = accuracy_of(output / "best", inputs / "validation.csv", model=best)
    assert summary["best"]["score"] == pytest.approx(score)


def trained_share(said: str) -> str:
    [line] = [line for line in said.splitlines() if "Number of trainable parameters" in line]
    return line.split(" = ")[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_a_classifier_learns_by_adapters_on_two_ranks(inputs, tmp_path, launcher):
    before = (inputs / "model" / "model.safetensors").read_bytes()
    finished = launch(
        launcher,
        "recipes/classification.py",
        "--config",
        str(inputs / "run.yaml"),
        f"train.output_dir={tmp_path / 'run'}",
        *LORA,
        "noise.kind=r3f",
        "noise.sigma=0.01",
        "train.gradient_checkpointing=true",
        "train.max_steps=16",
        "eval.eval_steps=4",
        "eval.keep_best=either",
    )
    assert finished.code == 0, finished.err
    check_classifier(inputs, tmp_path / "run")
    assert (inputs / "model" / "model.safetensors").read_bytes() == before
    trained, whole = trained_share(finished.out).split(" of ")
    assert int(trained.replace(",", "")) < int(whole.split()[0].replace(",", "")) / 2


@pytest.mark.usefixtures("fresh_accelerate")
def test_r4f_normalises_the_head_beside_the_adapters(classification, inputs, tmp_path, capsys):
    config = ["--config", str(inputs / "run.yaml"), f"train.output_dir={tmp_path / 'run'}"]
    code = classification.main(
        [*config, *LORA, "noise.kind=r4f", "train.num_train_epochs=3", "eval.keep_best=averaged"]
    )
    assert code == 0, capsys.readouterr().err
    check_classifier(inputs, tmp_path / "run")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_writer_learns_by_adapters_and_its_folder_writes_what_the_run_reported(
    seq2seq, text_inputs, tmp_path, capsys
):
    base = save_encoder_decoder(tmp_path / "model")
    output = tmp_path / "run"
    code = seq2seq.main(
        [
            "--config", str(text_inputs / "run.yaml"), f"train.output_dir={output}",
            "model.config=null", "model.vocab_size=null", f"model.model_name_or_path={base}",
            *LORA, "model.lora_dropout=0", "train.max_steps=20",
        ]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (output / "samples-validation.jsonl").read_text().splitlines()]
    for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
        model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), output / folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(output / folder)
        inputs = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, num_beams=2, max_new_tokens=12)
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        assert [row[weights] for row in rows] == texts
