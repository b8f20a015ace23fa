"""Models of which ranks would run different modules, or not all of them, train on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from every_type import tiny_config
from launching import launch
from tiny_texts import save_encoder_decoder
from transformers import LEDConfig, LEDForConditionalGeneration, M2M100Config, M2M100ForConditionalGeneration

pytestmark = [pytest.mark.recipe, pytest.mark.slow]

IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
DROPPED = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}


@pytest.mark.parametrize(
    ("config_file", "config", "kind", "entries"),
    [
        ("zero3_cpu.yaml", LEDConfig, LEDForConditionalGeneration, {}),
        ("ddp_cpu.yaml", LEDConfig, LEDForConditionalGeneration, {}),
        ("ddp_cpu.yaml", M2M100Config, M2M100ForConditionalGeneration, DROPPED),
    ],
    ids=["a LED pads some batches", "a LED leaves weights unused", "a M2M100 drops layers"],
)
def test_ranks_run_the_same_modules(config_file, config, kind, entries, tmp_path: Path):
    save_encoder_decoder(tmp_path / "tokens")
    torch.manual_seed(0)
    kind(tiny_config(config, **IDS, **entries)).save_pretrained(tmp_path / "model")
    # Every second source fills LED's window of 8 tokens, with the one at its end.
    rows = [{"source": " ".join(["a"] * (7 if number % 2 else 4)), "target": "chat"} for number in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    finished = launch(
        config_file,
        "recipes/seq2seq.py",
        *(f"model.model_name_or_path={tmp_path / 'model'}", f"model.tokenizer_name={tmp_path / 'tokens'}"),
        *(
            f"data.train_file={tmp_path / 'train.jsonl'}",
            "data.max_source_length=16",
            "data.max_target_length=8",
        ),
        *("train.per_device_train_batch_size=1", "train.max_steps=6", "train.warmup_steps=0"),
        *("averaging.rule=swa", "noise.kind=r3f", "noise.sigma=0.1", f"train.output_dir={tmp_path / 'run'}"),
        "eval.predict_with_generate=false",
    )
    assert finished.code == 0, finished.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
