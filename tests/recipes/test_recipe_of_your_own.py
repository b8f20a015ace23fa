"""What docs/recipes.md says about a copy of a recipe, done to a copy and trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launching import ROOT, launch

pytestmark = pytest.mark.distributed

DIFF = re.compile(r"^```diff\n(.*?)^```", re.S | re.M)


def changed(recipe: str, diff: str) -> str:
    """The recipe after a diff whose kept and removed lines occur in it once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert recipe.count(before) == 1, f"not once in the recipe:\n{before}"
    return recipe.replace(before, after)


def test_another_loss_number_optimizer_and_schedule_take_changes_of_the_recipe_alone(inputs, tmp_path):
    recipe = (ROOT / "recipes" / "classification.py").read_text()
    diffs = DIFF.findall((ROOT / "docs" / "recipes.md").read_text())
    assert len(diffs) == 5
    for diff in diffs:
        recipe = changed(recipe, diff)
    mine, output = tmp_path / "mine.py", tmp_path / "out"
    mine.write_text(recipe)
    settings = (
        "train.max_steps=4",
        "train.save_steps=2",
        "train.logging_steps=1",
        "train.learning_rate=0.01",
    )
    arguments = ("--config", str(inputs / "run.yaml"), f"train.output_dir={output}", *settings)
    done = launch("ddp_cpu.yaml", str(mine), *arguments)
    assert done.code == 0, done.err
    assert "accuracy" in next(line for line in done.out.splitlines() if line.startswith("step 1/4"))
    lines = map(json.loads, Path(output / "metrics.jsonl").read_text().splitlines())
    records = [record for record in lines if record["kind"] == "train"]
    assert [record["learning_rate"] for record in records] == pytest.approx(
        [0.01 * (1 - step / 4) ** 0.5 for step in range(4)]
    )
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    assert (output / "final-averaged" / "model.safetensors").exists()
