from __future__ import annotations

import pytest
from launching import launch

pytestmark = pytest.mark.recipe


@pytest.mark.parametrize(
    ("recipe", "folder"),
    [pytest.param("classification", "inputs", marks=pytest.mark.slow), ("seq2seq", "text_inputs")],
    ids=["classes", "texts"],
)
def test_rows_that_one_rank_alone_does_not_have_end_both(recipe, folder, request, tmp_path):
    config, output = request.getfixturevalue(folder) / "run.yaml", tmp_path / "run"
    finished = launch(
        "ddp_cpu.yaml",
        "tests/recipes/lonely_rows.py",
        *(recipe, "--config", str(config), f"train.output_dir={output}"),
    )
    assert finished.code != 0
    assert "error on rank 1: " in finished.err
    assert "data.test_file: there is no file /nowhere/test.csv" in finished.err
    assert "step 1/" not in finished.out
