"""A launcher that ends at a signal takes its ranks along, and they leave a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tiny_inputs import save_model, save_rows

ROOT = Path(__file__).parents[2]
RUN_S, END_S = 200, 40
"""Seconds in which a run comes to its fifth step on a busy machine, and in which its ranks end."""

pytestmark = [pytest.mark.recipe, pytest.mark.timeout(RUN_S + 3 * END_S)]


def start(tmp_path: Path, config: str) -> subprocess.Popen:
    """A run that does not end by itself, under `accelerate launch`."""
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.csv", 30, seed=1)
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "launch" / "accelerate" / config), "recipes/classification.py"),
        f"model.model_name_or_path={tmp_path / 'model'}",
        f"data.train_file={tmp_path / 'rows.csv'}",
        f"data.validation_file={tmp_path / 'rows.csv'}",
        "data.max_seq_length=16",
        "train.num_train_epochs=100000",
        "train.logging_steps=1",
        f"train.output_dir={tmp_path / 'run'}",
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
        )


@pytest.mark.parametrize(
    ("config", "number"),
    [
        pytest.param("single.yaml", signal.SIGTERM, id="one process, which is not handed SIGTERM"),
        pytest.param(
            "ddp_cpu.yaml", signal.SIGUSR1, id="two, which are not handed SIGUSR1", marks=pytest.mark.slow
        ),
        pytest.param("ddp_cpu.yaml", signal.SIGKILL, id="two, which nobody can tell", marks=pytest.mark.slow),
    ],
)
def test_ranks_save_and_end_with_their_launcher(tmp_path, config, number):
    launcher, log = start(tmp_path, config), tmp_path / "log"
    ranks: list[psutil.Process] = []
    try:
        until = time.monotonic() + RUN_S
        while "step 5" not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(number)
        launcher.wait(END_S)
        _, left = psutil.wait_procs(ranks, timeout=END_S)
        assert not left, log.read_text()[-3000:]
    finally:
        launcher.kill()
        for each in ranks:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "COMPLETE").exists(), log.read_text()[-3000:]
    assert "it has left a checkpoint" in log.read_text()
