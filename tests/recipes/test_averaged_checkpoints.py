"""`swaft average` of what a run in one process leaves."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from swaft.cli.main import main

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]


def test_the_last_checkpoints_of_a_run_are_averaged_as_torch_reads_them(
    classification, inputs, tmp_path, capsys
):
    run, out = tmp_path / "run", tmp_path / "soup"
    settings = ("train.max_steps=18", "train.save_steps=4", "train.save_total_limit=3", "eval.eval_steps=18")
    config = ["--config", str(inputs / "run.yaml"), f"train.output_dir={run}"]
    assert classification.main([*config, *settings]) == 0, capsys.readouterr().err
    words = ["average", str(run), "--last", "3", "--output", str(out)]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "--trust-pickle" in said
    assert "--base" in said
    assert main([*words, "--base", str(run / "final"), "--trust-pickle"]) == 0, capsys.readouterr().err
    states = []
    for step in (8, 12, 16):
        dcp_to_torch_save(run / f"checkpoint-{step}" / "engine", tmp_path / "whole.pt")
        states.append(torch.load(tmp_path / "whole.pt", weights_only=True)["model"])
    found, final = load_file(out / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    assert found.keys() == final.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = torch.stack([state[name] for state in states]).double().mean(0).float()
        assert torch.equal(tensor, expected), name
