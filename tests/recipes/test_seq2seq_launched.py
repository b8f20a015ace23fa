from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch_alike
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from swaft.training.config import load_config
from swaft.training.data.seq2seq import Seq2SeqConfig

pytestmark = pytest.mark.recipe

LAUNCHERS = ("single.yaml", "ddp_cpu.yaml", "zero3_cpu.yaml")
ROWS = {"validation": 23, "test": 11}


@pytest.fixture(scope="module")
def runs(text_inputs, tmp_path_factory) -> dict[str, Path]:
    """The same run in one process, under DDP and under ZeRO-3."""
    return launch_alike(LAUNCHERS, "seq2seq", text_inputs / "run.yaml", tmp_path_factory.mktemp("runs"))


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def samples_of(output: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"samples-{split}.jsonl").read_text().splitlines()]


def first_loss(output: Path) -> float:
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def written_by(folder: Path, rows: list[dict[str, Any]]) -> tuple[list[str], float]:
    """What a saved folder writes, all rows at once, and its loss a token, by nothing but transformers."""
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
    targets = tokenizer(text_target=[row["references"][0] for row in rows], padding=True, return_tensors="pt")
    labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
    with torch.no_grad():
        ids = model.generate(**inputs, num_beams=2, max_new_tokens=12)
        loss = model(**inputs, labels=labels).loss.item()
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)], loss


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_plain_transformers_writes_from_the_saved_folders_what_the_run_reported(runs, launcher):
    output = runs[launcher]
    scores = summary_of(output)["scores"]
    for split, count in ROWS.items():
        rows = samples_of(output, split)
        assert (
            len({row["source"] for row in rows}) == len(rows) == count
        )  # neither is a multiple of any batch
        for weights, folder in (("last", "final"), ("averaged", "final-averaged")):
            texts, loss = written_by(output / folder, rows)
            assert [row[weights] for row in rows] == texts
            assert scores[split][weights]["loss"] == pytest.approx(loss, rel=1e-5)


def test_what_is_learnt_is_written(runs):
    for output in runs.values():
        scores = summary_of(output)["scores"]["validation"]
        assert scores["last"]["chrf"] > 60
        assert scores["averaged"]["chrf"] > 60
        last, averaged = (
            load_file(output / name / "model.safetensors") for name in ("final", "final-averaged")
        )
        assert not torch.equal(last["shared.weight"], averaged["shared.weight"])


def test_every_engine_has_the_same_tokenizer_and_trains_the_same(runs):
    single, *others = runs.values()
    tokenizer = (single / "final" / "tokenizer.json").read_bytes()
    for output in others:
        assert (output / "final" / "tokenizer.json").read_bytes() == tokenizer
        assert (output / "final-averaged" / "tokenizer.json").read_bytes() == tokenizer
    # At the rate these rows are learnt with, rounding has grown to something after a few steps. One process
    # weighs rows a little differently: the loss of each of two ranks is a mean over its own tokens.
    first, *losses = (first_loss(output) for output in (single, *others))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses == pytest.approx([first, first], rel=0.02)


def test_the_summary_says_how_each_score_was_computed(runs):
    details = summary_of(runs["zero3_cpu.yaml"])["details"]["validation"]["averaged"]
    assert set(details["signatures"]) == {"chrf"}
    assert details["generation"].items() >= {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": 1}.items()


def test_the_configuration_of_a_new_model_reads_back(runs):
    config = load_config(Seq2SeqConfig, ["--config", str(runs["single.yaml"] / "config.yaml")])
    assert config.model.config is not None
    assert (config.model.config["model_type"], config.noise.kind) == ("t5", "r3f")
