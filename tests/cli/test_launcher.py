"""What is read of a launch line is what `accelerate launch` would start; what it would start wrongly is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from accelerate.commands import launch

from swaft.errors import ConfigError
from swaft.training.launch.launcher import read_launch, read_script

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))}
RECIPE = "recipes/classification.py"
ENGINES = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}


def words_for(name: str) -> list[str]:
    machines = ["--num_machines", "2", "--num_processes", "16"] if name.endswith("_multinode") else []
    return ["--config_file", str(FILES[name]), *machines]


def problems_of(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_launch([*words, RECIPE])
    return caught.value.problems


@pytest.fixture
def launch_file(tmp_path):
    def write(**entries: object) -> str:
        path = tmp_path / "launch.yaml"
        path.write_text("\n".join(f"{name}: {value}" for name, value in entries.items()))
        return str(path)

    return write


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_file_is_read_as_the_engine_of_its_name(name):
    words = [*words_for(name), RECIPE, "--config", "a.yaml", "b.c=d e"]
    found, script = read_launch(words), read_script(words)
    stem = name.removesuffix("_cpu").removesuffix("_multinode")
    stage = int(stem[4]) if stem.startswith("zero") else None
    assert found.stage == stage
    assert found.engine == (ENGINES[stem] if stage is None else f"DeepSpeed ZeRO-{stage}")
    ranks = {"single": 1}.get(stem, 16 if name.endswith("_multinode") else 2)
    assert (found.num_machines, found.world_size) == (16 // 8 if ranks == 16 else 1, ranks)
    assert (script.path, script.arguments) == (RECIPE, ["--config", "a.yaml", "b.c=d e"])


@pytest.mark.parametrize("name", FILES)
def test_the_ranks_environment_is_the_one_that_accelerate_sets(name, monkeypatch):
    told = {}
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: told.update(os.environ))

    def process(command, env):
        told.update(env)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    monkeypatch.setattr(launch.subprocess, "Popen", process)
    where = ["--main_process_ip", "localhost", "--machine_rank", "1", "--main_process_port", "29511"]
    words = [*words_for(name), *(where if name.endswith("_multinode") else []), RECIPE]
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    found = read_launch(words).environ
    read = {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    assert read == {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    assert read["ACCELERATE_MIXED_PRECISION"] in ("no", "bf16")


def test_a_launch_for_a_cluster_is_read_where_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("looked at this machine's devices"))
    words = [
        "--config_file",
        str(FILES["zero3_multinode"]),
        "--num_machines",
        "128",
        "--num_processes",
        "1024",
    ]
    found = read_launch([*words, "--mixed_precision", "fp16", RECIPE])
    assert (found.num_machines, found.world_size) == (128, 1024)
    assert found.environ["WORLD_SIZE"] == "1024"
    assert found.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_a_port_that_is_taken_on_this_machine_says_nothing_about_another():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert (
            read_launch([*words_for("ddp_multinode"), "--main_process_port", port, RECIPE]).world_size == 16
        )


def test_the_line_wins_over_the_file():
    words = [*words_for("zero3"), "--deepspeed_config_file", "ds_configs/zero2.json", "--num_processes", "8"]
    found = read_launch([*words, RECIPE])
    assert (found.engine, found.world_size) == ("DeepSpeed ZeRO-2", 8)


def test_a_line_without_a_file_says_all_itself():
    found = read_launch(["--use_deepspeed", "--zero_stage", "3", "--num_processes", "8", RECIPE])
    assert (found.engine, found.stage, found.world_size) == ("DeepSpeed ZeRO-3", 3, 8)
    assert read_launch(["--multi_gpu", "--num_processes", "4", RECIPE]).engine == "DDP"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "set how many with --num_processes"),
        (("--num_processes", "4"), "add --multi_gpu"),
        (("--multi_gpu", "--use_deepspeed", "--num_processes", "4"), "exclude each other"),
        (("--use_megatron_lm", "--num_processes", "4"), "does not train with --use_megatron_lm"),
        (("--num_proceses", "4"), "unrecognized arguments: --num_proceses"),
        (("--num_processes", "four"), "invalid int value"),
        (("--config_file", "nowhere.yaml"), "--config_file nowhere.yaml: cannot be read"),
        (("--config_file", "launch/accelerate/zero3_multinode.yaml"), "manually pass in `--num_processes`"),
        (
            ("--config_file", "launch/accelerate/single.yaml", "--num_processes", "4"),
            "starts 1 on each machine",
        ),
        (("--config_file", "launch/accelerate/zero3.yaml", "--cpu"), "starts 1 on each machine"),
        (
            ("--config_file", "launch/accelerate/zero3.yaml", "--cpu", "--num_processes", "1"),
            "drop DeepSpeed",
        ),
        (("--config_file", "launch/accelerate/ddp.yaml", "--num_processes", "0"), "expected at least 1"),
        (
            ("--config_file", "launch/accelerate/ddp_multinode.yaml", "--num_processes", "15"),
            "2 machines would start 14",
        ),
        (
            ("--config_file", "launch/accelerate/zero3.yaml", "--num_machines", "2"),
            "deepspeed_multinode_launcher is pdsh",
        ),
        (
            ("--config_file", "launch/accelerate/zero3.yaml", "--deepspeed_config_file", "nowhere.json"),
            "'nowhere.json' is neither a file",
        ),
        (
            ("--use_deepspeed", "--zero_stage", "4", "--num_processes", "2"),
            "stage is 4; expected 0, 1, 2 or 3",
        ),
    ],
)
def test_what_accelerate_would_do_wrongly_or_not_at_all_is_told(words, expected, monkeypatch, tmp_path):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    assert any(expected in problem for problem in problems_of(*words))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"num_procesess": 2}, "there is no entry num_procesess. Did you mean 'num_processes'?"),
        ({"deepspeed_config": "{zero_stag: 2}"}, "deepspeed_config: there is no entry zero_stag"),
        ({"deepspeed_config": "{zero_stage: 5}"}, "zero_stage is 5; expected 0, 1, 2 or 3"),
        (
            {"deepspeed_config": "{gradient_clipping: on}"},
            "gradient_clipping is True; expected a number or auto",
        ),
        ({"deepspeed_config": "zero3"}, "deepspeed_config: expected entries below it"),
        ({"distributed_type": "DEEPSPED"}, "Did you mean 'DEEPSPEED'?"),
        ({"distributed_type": "NO"}, "distributed_type: an unquoted no is false in YAML"),
        ({"mixed_precision": "no"}, "mixed_precision: an unquoted no is false in YAML"),
        ({"mixed_precision": "fp32"}, "mixed_precision: 'fp32' is not one of"),
        ({"num_processes": "two"}, "num_processes: 'two' is not a whole number"),
        ({"num_processes": "null"}, "num_processes: None is not a whole number"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "expected LOCAL_MACHINE"),
    ],
)
def test_an_entry_of_a_launch_file_that_cannot_be_meant_is_named(entries, expected, launch_file):
    path = launch_file(**({"distributed_type": "MULTI_GPU", "num_processes": 2} | entries))
    [problem] = problems_of("--config_file", path)
    assert problem.startswith(f"{path}: ")
    assert expected in problem


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", ""])
def test_a_launch_file_that_is_none_is_named(content, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(content)
    [problem] = problems_of("--config_file", str(path))
    assert problem.startswith(f"--config_file {path}: ")


def test_everything_that_is_wrong_with_a_launch_is_told_at_once(launch_file):
    path = launch_file(
        distributed_type="DEEPSPEED", num_process=2, mixed_precision="fp23", machine_rank="one"
    )
    with pytest.raises(ConfigError) as caught:
        read_launch(["--config_file", path, "--tpu", "nowhere.py"])
    told = "\n".join(caught.value.problems)
    for part in (
        "nowhere.py: there is no such file",
        "--tpu",
        "num_process.",
        "'fp23'",
        "machine_rank: 'one'",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no "zero_optimization" section'),
        ("{}", 'has no "zero_optimization" section'),
        ('{"zero_optimization": {"stage": "auto"}}', "stage is 'auto'; expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3}, "bf16": true}', '"bf16" is True; expected a section'),
    ],
)
def test_a_deepspeed_file_that_is_none_is_named(content, expected, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    [problem] = problems_of(*words_for("zero3"), "--deepspeed_config_file", str(path))
    assert str(path) in problem
    assert expected in problem


def test_the_script_is_known_also_where_the_launch_is_wrong():
    found = read_script(["--config_file", "nowhere.yaml", RECIPE, "a.b=c"])
    assert (found.path, found.arguments, found.is_file) == (RECIPE, ["a.b=c"], True)
    assert not read_script(["--module", "os"]).is_file
