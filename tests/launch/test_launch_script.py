from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from cluster import ROOT, Cluster, value_of

pytestmark = pytest.mark.unit

FILES = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch" / "slurm").iterdir()]
ZERO3 = ("launch/accelerate/zero3_multinode.yaml", "recipes/classification.py")
SINGLE = "launch/accelerate/single.yaml"
TWO = ("--hosts", "node-a.rack,b_2", "--gpus-per-node", "8")


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def printed(finished: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The words of each machine's command that a dry run printed."""
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    return {
        name.removeprefix("# "): shlex.split(command)
        for name, command in zip(lines[::2], lines[1::2], strict=True)
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_every_script(path):
    shell = [shutil.which("shellcheck")] if shutil.which("shellcheck") else ["bash", "-n"]
    checked = subprocess.run([*map(str, shell), str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_dry_run_prints_the_command_of_every_machine_and_starts_nothing(cluster):
    finished = cluster.run(
        "launch.sh", "--dry-run", *TWO, *ZERO3, "--config", "mine.yaml", "data.train_file=my rows; $HOME.csv",
        environment=cluster.environment(nodes=0),
    )  # fmt: skip
    commands = printed(finished)
    assert list(commands) == ["node-a.rack", "b_2"]
    for rank, words in enumerate(commands.values()):
        assert value_of("--machine_rank", words) == str(rank)
        assert value_of("--main_process_ip", words) == "node-a.rack"
        assert value_of("--num_machines", words) == "2"
        assert value_of("--num_processes", words) == "16"
        assert words[-4:] == [ZERO3[1], "--config", "mine.yaml", "data.train_file=my rows; $HOME.csv"]
    assert not cluster.record.exists()


@pytest.mark.parametrize("hosts", ["one", "one,two,three"])
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "single"], ids=lambda path: path.stem
)
def test_accelerate_understands_the_command_for_every_launch_file(cluster, path, hosts):
    file = f"launch/accelerate/{path.name}"
    words = ("--dry-run", "--hosts", hosts, "--gpus-per-node", "2", file, ZERO3[1], "--config", "x.yaml")
    commands = printed(cluster.run("launch.sh", *words, environment=cluster.environment(nodes=0)))
    last = list(commands.values())[-1]
    understood = launch_command_parser().parse_args(last[last.index("launch") + 1 :])
    assert (understood.config_file, understood.training_script) == (file, ZERO3[1])
    assert understood.num_processes == 2 * len(commands)
    assert understood.training_script_args == ["--config", "x.yaml"]
    if len(commands) > 1:
        assert understood.machine_rank == 2
        assert understood.deepspeed_multinode_launcher == "standard"


def test_what_is_run_is_what_the_dry_run_printed(cluster):
    environment = cluster.environment(nodes=0)
    commands = printed(
        cluster.run("launch.sh", "--dry-run", *TWO, *ZERO3, "a.b=c d", environment=environment)
    )
    assert (
        cluster.run("launch.sh", *TWO, "--rank", "1", *ZERO3, "a.b=c d", environment=environment).returncode
        == 0
    )
    (call,) = cluster.calls("accelerate")
    words = commands["b_2"]
    assert call["words"] == words[words.index("accelerate") + 1 :]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240" in words
    assert call["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "240"
    assert call["environment"]["PET_SIGNALS_TO_HANDLE"].split(",")[-1] == "SIGUSR1"


def test_accelerate_takes_the_place_of_the_script_so_that_signals_reach_it(cluster):
    process = cluster.start(
        "launch.sh", "--gpus-per-node", "1", *ZERO3, environment=cluster.environment(nodes=0)
    )
    process.communicate(timeout=60)
    assert cluster.calls("accelerate")[0]["pid"] == process.pid


def test_a_file_for_one_process_starts_one(cluster):
    words = ("--gpus-per-node", "1", SINGLE, ZERO3[1])
    assert cluster.run("launch.sh", *words, environment=cluster.environment(nodes=0)).returncode == 0
    assert value_of("--num_processes", cluster.calls("accelerate")[0]["words"]) == "1"


def test_deepspeeds_extension_is_built_by_one_process_first_where_the_file_asks_for_deepspeed(cluster):
    environment = cluster.environment(nodes=0)
    cluster.run("launch.sh", "--gpus-per-node", "2", *ZERO3, environment=environment)
    assert [call["words"] for call in cluster.calls("python")] == [
        ["-m", "swaft.training.launch.deepspeed_extension"]
    ]
    cluster.run(
        "launch.sh", "--gpus-per-node", "2", "launch/accelerate/ddp.yaml", ZERO3[1], environment=environment
    )
    assert len(cluster.calls("python")) == 1


def test_no_rank_starts_where_the_extension_cannot_be_built(cluster):
    environment = cluster.environment(nodes=0, PYTHON_CODE_0="3")
    assert cluster.run("launch.sh", "--gpus-per-node", "2", *ZERO3, environment=environment).returncode == 3
    assert cluster.calls("accelerate") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((*TWO, *ZERO3), "which of node-a.rack b_2 is this? give --rank, from 0 to 1"),
        ((*TWO, "--rank", "2", *ZERO3), "give --rank, from 0 to 1"),
        (ZERO3, "give --gpus-per-node"),
        (("--gpus-per-node", "many", *ZERO3), "give --gpus-per-node"),
        (("--gpus-per-node", "2", ZERO3[0]), "give a file of launch/accelerate/ and a recipe"),
        (("--gpus-per-node", "2", "zero4.yaml", ZERO3[1]), "there is no file zero4.yaml"),
        (
            ("--gpus-per-node", "2", SINGLE, ZERO3[1]),
            f"1 hosts x 2 GPUs, but {SINGLE} has distributed_type NO, which trains on one; expected another file",
        ),
        ((*TWO[:-1], "1", "--rank", "0", SINGLE, ZERO3[1]), "2 hosts x 1 GPUs, but"),
        (("--nodes", "2", *ZERO3), "there is no option --nodes"),
        (("--rank",), "--rank needs a value"),
    ],
)
def test_what_is_missing_is_named_and_nothing_starts(cluster, words, expected):
    finished = cluster.run("launch.sh", *words, environment=cluster.environment(nodes=0))
    assert finished.returncode == 2
    assert expected in finished.stderr
    assert not cluster.record.exists()
