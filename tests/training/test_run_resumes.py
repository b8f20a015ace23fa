"""What a run leaves in its checkpoints, and how it goes on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import make_classifier, make_rows
from torch import nn
from torch.utils.data import default_collate

import swaft
from swaft.averaging import state
from swaft.noise import TaskLoss
from swaft.training.launch import ddp

pytestmark = pytest.mark.unit

OLDER_CONFIG = Path(__file__).parent / "older_config.yaml"


def test_a_run_folder_with_an_older_config_resumes_to_the_bit_also_with_an_optimizer_without_state(
    run, tmp_path
):
    unbroken, resumed, rows = make_classifier(), make_classifier(), make_rows(8)
    folder = tmp_path / "older"
    run(unbroken, rows, output_dir=str(folder), max_steps=4, save_steps=2)
    own = (folder / "config.yaml").read_text()
    shutil.copy(OLDER_CONFIG, folder / "config.yaml")
    done = run(resumed, rows, output_dir=str(folder), max_steps=4, save_steps=2)
    assert [record["step"] for record in done.records] == [1, 2, 3, 4]  # two of them as they were
    assert (folder / "config.yaml").read_text() == own
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_an_objective_that_computes_no_loss_keeps_no_run_from_resuming(make_accelerator, monkeypatch, caplog):
    monkeypatch.setattr(ddp, "DistributedDataParallel", nn.Module)
    model, batch = make_classifier(), default_collate(make_rows(2))
    del batch["labels"], batch["idx"]
    ddp.settle_buckets(make_accelerator(), model, TaskLoss(), batch)
    assert "the first step after resuming may differ in its last bits" in caplog.text
    assert "has no loss" in caplog.text


def test_a_checkpoint_with_averages_sums_the_weights_once(run, tmp_path, monkeypatch):
    sums, sum_of_bits = [], state.sum_of_bits
    monkeypatch.setattr(state, "sum_of_bits", lambda runs: sums.append(sum_of_bits(runs)) or sums[-1])
    folder = tmp_path / "averaged"
    run(
        make_classifier(),
        make_rows(8),
        rule=swaft.SWA(start=0),
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
    )
    for path, each in zip(sorted(folder.glob("checkpoint-*")), sums, strict=True):
        written = [json.loads((path / part / "manifest.json").read_text()) for part in (".", "average")]
        assert [found["content"]["weights"] for found in written] == [str(each)] * 2
    assert sums[0] != sums[1]


def test_groups_with_different_rates_keep_their_ratio_to_the_setting_also_after_resuming(run, tmp_path):
    def groups(model):
        return [{"params": model.head.parameters(), "lr": 0.4}, {"params": model.embedding.parameters()}]

    unbroken, resumed, rows = make_classifier(), make_classifier(), make_rows(8)
    folder = str(tmp_path / "run")
    for model in (unbroken, resumed):  # the second one resumes where half of the steps are done
        done = run(model, rows, groups=groups, output_dir=folder, max_steps=4, warmup_steps=2, save_steps=2)
        assert [record["learning_rate"] for record in done.records] == pytest.approx([0.0, 0.2, 0.4, 0.2])
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_ctrl_c_tells_of_the_newest_checkpoint_if_there_is_one_to_resume_from(run):
    class Interrupted(TaskLoss):
        def __call__(self, model, batch):
            self.step += 1
            if self.step == 3:
                raise KeyboardInterrupt
            return super().__call__(model, batch)

    told = {}
    for settings in (
        {"save_steps": 2},
        {"save_steps": 100},
        {"save_steps": 2, "resume_from_checkpoint": "none"},
    ):
        with pytest.raises(KeyboardInterrupt) as raised:
            run(make_classifier(), make_rows(10), objective=Interrupted(), max_steps=4, **settings)
        told[tuple(settings.values())] = getattr(raised.value, "__notes__", [])
    resumes = "when started again, the run resumes from its newest checkpoint"
    assert told == {(2,): [resumes], (100,): [], (2, "none"): []}
