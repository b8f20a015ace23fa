from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch
from launching import launch
from tiny_inputs import save_model, save_rows

pytestmark = [
    pytest.mark.recipe,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA DeepSpeed builds no such extension"),
]


def test_ranks_that_would_wait_for_a_killed_build_end_and_name_its_lock_and_what_clears_it(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = Path(tmp_path / "extensions" / "deepspeed_shm_comm" / "lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    rows = save_rows(tmp_path / "train.csv", 8, seed=1)
    finished = launch(
        "zero3_cpu.yaml",
        "recipes/classification.py",
        f"model.model_name_or_path={save_model(tmp_path / 'model')}",
        f"data.train_file={rows}",
        "data.max_seq_length=16",
        f"train.output_dir={tmp_path / 'run'}",
    )
    assert finished.code != 0
    told = [line for line in finished.err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert re.search(rf"{re.escape(str(lock))} is 6\d minutes old", finished.err)
    assert (
        "Delete that file, then run `python -m swaft.training.launch.deepspeed_extension` once"
        in finished.err
    )
    assert not (tmp_path / "run").exists()
