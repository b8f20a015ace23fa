"""Every recipe under every engine, whatever else is switched on.

A cover of all pairs of settings; and, in `make test-full`, each recipe under each engine in each precision, with
and without adapters.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch_several
from pairwise import Row, pairwise
from safetensors.torch import load_file
from tiny_texts import NEW_MODEL, save_encoder_decoder

pytestmark = pytest.mark.recipe

LAUNCHERS = {  # by the name that the run folder gives the engine
    "plain": "single.yaml",
    "ddp": "ddp_cpu.yaml",
    "deepspeed-zero0": "zero0_cpu.yaml",
    "deepspeed-zero1": "zero1_cpu.yaml",
    "deepspeed-zero2": "zero2_cpu.yaml",
    "deepspeed-zero3": "zero3_cpu.yaml",
    "fsdp2": "fsdp2_cpu.yaml",
}
RECIPES = {
    "classification": "inputs",
    "seq2seq": "text_inputs",
    "question_answering": "question_inputs",
    "causal_lm": "answer_inputs",
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "engine": tuple(LAUNCHERS),
    "recipe": tuple(RECIPES),
    "noise": ("none", "r3f", "rdrop"),
    "rule": ("swa", "ema", "windows"),
    "precision": ("no", "bf16"),
    "lora": (False, True),
    "accumulation": (1, 2),
    "checkpointing": (False, True),
}
STEPS = 12
LEARNS_SOON = ("train.learning_rate=1e-2", "train.per_device_train_batch_size=8")


def rows_to_try(every: bool) -> list[Row]:
    if not every:
        return pairwise(FACTORS)
    chosen = {name: FACTORS[name] for name in ("engine", "recipe", "precision", "lora")}
    rest = {"noise": "r3f", "rule": "swa", "accumulation": 1, "checkpointing": False}
    return [dict(zip(chosen, values, strict=True)) | rest for values in product(*chosen.values())]


def arguments(row: Row, inputs: Path, pretrained: str, output: Path) -> list[str]:
    lora = ["model.use_peft=true", "model.lora_r=4"] if row["lora"] else []
    if lora and row["recipe"] == "seq2seq":  # adapters change a pretrained model; the inputs name a new one
        lora += ["model.config=null", "model.vocab_size=null", f"model.model_name_or_path={pretrained}"]
    elif (row["recipe"], row["noise"]) == ("seq2seq", "rdrop"):  # the inputs' new model has no dropout
        lora = [f"model.config={NEW_MODEL.replace('dropout_rate: 0.0', 'dropout_rate: 0.1')}"]
    return [
        *("--config", str(inputs / "run.yaml")),
        f"train.output_dir={output}",
        f"train.max_steps={STEPS}",
        "train.logging_steps=1",
        f"train.gradient_accumulation_steps={row['accumulation']}",
        f"train.gradient_checkpointing={str(row['checkpointing']).lower()}",
        f"noise.kind={row['noise']}",
        f"averaging.rule={row['rule']}",
        *(["averaging.blocks=2"] if row["rule"] == "windows" else []),
        *lora,
        *(LEARNS_SOON if row["recipe"] == "classification" else ()),
        "eval.eval_steps=8",
    ]


@pytest.mark.parametrize("engine", LAUNCHERS)
@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_recipes_train_average_evaluate_and_save_whatever_is_switched_on(every, engine, request, tmp_path):
    rows = [row for row in rows_to_try(every) if row["engine"] == engine]
    runs = []
    pretrained = save_encoder_decoder(tmp_path / "pretrained")
    for number, row in enumerate(rows):
        inputs = request.getfixturevalue(RECIPES[row["recipe"]])
        words = arguments(row, inputs, pretrained, tmp_path / str(number))
        runs.append((row["recipe"], row["precision"], words))
    launch_several(LAUNCHERS[engine], runs, tmp_path, timeout_s=60 + 60 * len(runs))
    for number, row in enumerate(rows):
        require_whole_run(tmp_path / str(number), row)


def require_whole_run(output: Path, row: Row) -> None:
    environment = json.loads((output / "env.json").read_text())
    assert environment["world_size"] == (1 if row["engine"] == "plain" else 2), row
    assert environment["mixed_precision"] == row["precision"], row
    assert environment["engine"] == row["engine"], row
    summary = json.loads((output / "summary.json").read_text())
    assert summary["applied_steps"] == STEPS, row
    assert summary["num_averaged"] > 1, row
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == STEPS, row
    assert sum(losses[-3:]) < sum(losses[:3]), (row, losses)  # learnt something
    name = "adapter_model.safetensors" if row["lora"] else "model.safetensors"
    last, averaged = (load_file(output / folder / name) for folder in ("final", "final-averaged"))
    assert last.keys() == averaged.keys(), row
    assert any(not torch.equal(last[key], averaged[key]) for key in last), row
    assert all(value.isfinite().all() for value in averaged.values()), row
    for split in ("validation", "test"):
        assert set(summary["scores"][split]) == {"last", "averaged"}, row
