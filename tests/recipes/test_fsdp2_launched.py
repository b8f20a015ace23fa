"""The same run under FSDP2 and under DDP, two ranks each: sharding may change nothing but where weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch_several
from safetensors.torch import load_file

pytestmark = [pytest.mark.recipe, pytest.mark.slow]

RECIPES = ("classification", "seq2seq")


@pytest.fixture(scope="module")
def runs(inputs, text_inputs, tmp_path_factory) -> dict[str, Path]:
    """A folder for each engine, with a run of each recipe."""
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in ("ddp", "fsdp2")}
    settings = ("train.max_steps=12", "train.logging_steps=1", "train.learning_rate=1e-3", "noise.kind=r3f")
    for engine, folder in folders.items():
        todo = [
            (
                recipe,
                "no",
                ["--config", f"{where / 'run.yaml'}", f"train.output_dir={folder / recipe}", *settings],
            )
            for recipe, where in zip(RECIPES, (inputs, text_inputs), strict=True)
        ]
        finished = launch_several(f"{engine}_cpu.yaml", todo, folder)
        assert f"Engine = {engine.upper()}" in finished.out
    return folders


def training(output: Path, name: str) -> list[float]:
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if record["kind"] == "train"]


def scores(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())["scores"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fsdp2_trains_as_ddp_does(runs, recipe):
    ddp, fsdp2 = (folder / recipe for folder in runs.values())
    assert json.loads((fsdp2 / "env.json").read_text())["engine"] == "fsdp2"
    assert len(training(fsdp2, "loss")) == 12
    # Sums come in another order; what AdamW makes of that grows from step to step.
    assert training(fsdp2, "loss") == pytest.approx(training(ddp, "loss"), rel=1e-5)
    assert training(fsdp2, "grad_norm") == pytest.approx(training(ddp, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fsdp2_scores_and_saves_the_last_and_the_averaged_weights_as_ddp_does(runs, recipe):
    ddp, fsdp2 = (folder / recipe for folder in runs.values())
    for split, kinds in scores(ddp).items():
        for kind, expected in kinds.items():
            assert scores(fsdp2)[split][kind] == pytest.approx(expected, rel=1e-4)
    for folder in ("final", "final-averaged"):
        expected, found = (load_file(output / folder / "model.safetensors") for output in (ddp, fsdp2))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            # A gradient that is zero but for rounding, as that of the keys' biases, makes steps of full size.
            if not name.endswith("key.bias"):
                assert torch.allclose(found[name], weight, atol=1e-5), name


def test_sharded_weights_write_what_whole_ones_write(runs):
    for split in ("validation", "test"):
        whole, sharded = (
            (folder / "seq2seq" / f"samples-{split}.jsonl").read_text() for folder in runs.values()
        )
        assert sharded == whole
