"""What `accelerate launch` makes of every launch file, up to the moment at which ranks would start."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file

from swaft.training.config import TrainConfig
from swaft.training.launch.accelerator import resolve_deepspeed, resolve_precision
from swaft.training.launch.fsdp2 import resolve_fsdp2

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))}
MULTINODE = [name for name in FILES if name.endswith("_multinode")]
ON_TWO_MACHINES = [
    *("--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"),
    *("--main_process_ip", "node-a", "--main_process_port", "29511"),
]


@pytest.fixture
def launched(monkeypatch):
    """Call `accelerate launch` and return what it would start: torchrun's settings and the environment."""
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)

    def call(name: str, *options: str) -> SimpleNamespace:
        found = SimpleNamespace(torchrun=None)

        def torchrun(args) -> None:
            found.torchrun, found.environ = args, dict(os.environ)

        def process(command, env) -> SimpleNamespace:
            found.environ = env
            return SimpleNamespace(wait=lambda: None, returncode=0)

        monkeypatch.setattr(torch.distributed.run, "run", torchrun)
        monkeypatch.setattr(launch.subprocess, "Popen", process)
        words = ["--config_file", str(FILES[name]), *options, "recipe.py", "a.b=c d"]
        launch.launch_command(launch.launch_command_parser().parse_args(words))
        return found

    return call


def test_there_is_a_file_for_every_way_to_train():
    one_machine = {"single", "ddp", "zero1", "zero2", "zero3", "fsdp2"}
    on_the_cpu = {"ddp_cpu", "zero0_cpu", "zero1_cpu", "zero2_cpu", "zero3_cpu", "fsdp2_cpu"}
    machines = {"ddp_multinode", "zero2_multinode", "zero3_multinode", "fsdp2_multinode"}
    assert set(FILES) == one_machine | on_the_cpu | machines


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file_and_its_header_shows_its_own_launch_line(name):
    assert load_config_from_file(str(FILES[name])).use_cpu is False
    assert f"#   accelerate launch --config_file launch/accelerate/{name}.yaml" in FILES[name].read_text()


@pytest.mark.parametrize("name", [name for name in FILES if name not in MULTINODE])
def test_a_file_for_one_machine_starts_as_it_stands(name, launched):
    found = launched(name)
    precision = "no" if name.endswith("_cpu") or name == "single" else "bf16"
    assert found.environ["ACCELERATE_MIXED_PRECISION"] == precision
    if name == "single":
        assert found.torchrun is None
        assert "MASTER_ADDR" not in found.environ
    else:
        assert found.torchrun.nproc_per_node == "2"
        assert found.torchrun.training_script_args == ["a.b=c d"]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("zero")])
def test_a_zero_file_announces_its_stage_and_the_recipe_runs_it(name, launched):
    environ = launched(name, *(ON_TWO_MACHINES if name in MULTINODE else ())).environ
    train = TrainConfig(output_dir="unused")
    precision = resolve_precision(train, environ | {"WORLD_SIZE": "2"})
    filled = resolve_deepspeed(train, environ | {"WORLD_SIZE": "2"}, precision=precision, hidden_size=32)
    assert filled is not None
    assert filled.config["zero_optimization"]["stage"] == int(name[4])
    assert "auto" not in str(filled.config)
    assert environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_cpu", "fsdp2_multinode"])
def test_an_fsdp2_file_announces_version_2_with_every_rank_loading_the_model(name, launched):
    environ = launched(name, *(ON_TWO_MACHINES if name in MULTINODE else ())).environ
    assert environ["ACCELERATE_USE_FSDP"] == "true"
    assert environ["FSDP_VERSION"] == "2"
    assert environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert environ["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert environ["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert resolve_fsdp2(environ, precision="no") is not None


@pytest.mark.parametrize("name", MULTINODE)
def test_every_machine_starts_its_own_ranks_and_meets_the_others_where_told(name, launched):
    run = launched(name, *ON_TWO_MACHINES).torchrun
    assert (run.nnodes, run.nproc_per_node, run.node_rank) == ("2", "8", 1)
    assert (run.rdzv_backend, run.rdzv_endpoint) == ("static", "node-a:29511")


@pytest.mark.parametrize("name", MULTINODE)
def test_a_file_for_several_machines_does_not_start_without_their_number_of_ranks(name, launched):
    with pytest.raises(ValueError, match="--num_processes"):
        launched(name, *("--main_process_ip", "node-a", "--main_process_port", "29511"))


def test_the_command_line_names_another_deepspeed_file(launched):
    environ = launched("zero3", "--deepspeed_config_file", "ds_configs/zero3_offload.json").environ
    assert environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "ds_configs/zero3_offload.json"


def test_the_rendezvous_that_can_restart_is_chosen_on_the_command_line(launched):
    run = launched("zero3_multinode", *ON_TWO_MACHINES, "--rdzv_backend", "c10d").torchrun
    assert (run.rdzv_backend, run.rdzv_endpoint) == ("c10d", "node-a:29511")
