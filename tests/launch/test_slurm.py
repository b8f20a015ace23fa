"""The batch scripts among stand-ins for SLURM's commands, which record what they were told."""

from __future__ import annotations

import signal
import time

import pytest
from cluster import JOB, NODES, ROOT, Cluster, value_of

pytestmark = pytest.mark.unit

RUN = ("launch/accelerate/zero3_multinode.yaml", "recipes/classification.py", "--config", "mine.yaml")


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def test_every_node_starts_its_own_ranks_and_meets_the_others_at_the_first(cluster):
    finished = cluster.run("slurm/train.sbatch", *RUN, environment=cluster.environment(nodes=2))
    assert finished.returncode == 0, finished.stderr
    calls = cluster.calls("accelerate")
    assert [value_of("--machine_rank", call["words"]) for call in calls] == ["0", "1"]
    for call in calls:
        assert value_of("--main_process_ip", call["words"]) == NODES[0]
        assert value_of("--num_machines", call["words"]) == "2"
        assert value_of("--num_processes", call["words"]) == "8"
        assert call["words"][-3:] == ["recipes/classification.py", "--config", "mine.yaml"]
    ports = {int(value_of("--main_process_port", call["words"])) for call in calls}
    assert len(ports) == 1
    assert 10_000 <= ports.pop() < 30_000


def test_nodes_are_named_by_slurm_however_odd_their_names(cluster):
    finished = cluster.run("slurm/train.sbatch", "--dry-run", *RUN, environment=cluster.environment(nodes=3))
    told = [line.removeprefix("# ") for line in finished.stdout.splitlines() if line.startswith("# ")]
    assert told == [*NODES] * 3  # every node's task prints all
    assert cluster.calls("scontrol")[0]["words"] == ["show", "hostnames", JOB["SLURM_JOB_NODELIST"]]


def test_one_task_a_node_is_started_and_one_that_fails_ends_the_others(cluster):
    cluster.run("slurm/train.sbatch", *RUN, environment=cluster.environment(nodes=2))
    (call,) = cluster.calls("srun")
    options = {word for word in call["words"] if word.startswith("--")}
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= options


def test_an_override_with_spaces_arrives_whole(cluster):
    override = 'data.train_file=my "rows" $HOME *.csv'
    cluster.run("slurm/train.sbatch", *RUN, override, environment=cluster.environment(nodes=2))
    assert [call["words"][-1] for call in cluster.calls("accelerate")] == [override, override]


def test_the_exit_code_of_a_node_is_the_jobs(cluster):
    environment = cluster.environment(nodes=2, ACCELERATE_CODE_1="7")
    assert cluster.run("slurm/train.sbatch", *RUN, environment=environment).returncode == 7
    assert not [call for call in cluster.calls("scontrol") if call["words"][0] == "requeue"]


def test_caches_are_the_jobs_own_on_the_nodes_disk_and_the_hub_is_not_asked(cluster):
    cluster.run("slurm/train.sbatch", *RUN, environment=cluster.environment(TMPDIR="/local disk"))
    (call,) = cluster.calls("accelerate")
    seen = call["environment"]
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert seen[name].startswith("/local disk/swaft-")
        assert JOB["SLURM_JOB_ID"] in seen[name]
    assert (seen["HF_HUB_OFFLINE"], seen["HF_DATASETS_OFFLINE"], seen["PYTHONFAULTHANDLER"]) == (
        "1",
        "1",
        "1",
    )
    (build,) = cluster.calls("python")
    assert build["environment"]["TORCH_EXTENSIONS_DIR"] == seen["TORCH_EXTENSIONS_DIR"]


def test_what_the_user_has_set_stays(cluster):
    mine = {"HF_HUB_OFFLINE": "0", "TRITON_CACHE_DIR": "/mine"}
    cluster.run("slurm/train.sbatch", *RUN, environment=cluster.environment(**mine))
    seen = cluster.calls("accelerate")[0]["environment"]
    assert {name: seen[name] for name in mine} == mine


@pytest.mark.parametrize("told", [None, "12"])
def test_srun_gets_the_processors_that_sbatch_was_told(cluster, told):
    more = {"SLURM_CPUS_PER_TASK": told} if told else {}
    cluster.run("slurm/train.sbatch", *RUN, environment=cluster.environment(**more))
    assert cluster.calls("srun")[0]["environment"].get("SRUN_CPUS_PER_TASK") == told


OF_AN_ARRAY = {"SLURM_ARRAY_JOB_ID": JOB["SLURM_JOB_ID"], "SLURM_ARRAY_TASK_ID": "3"}
"""One task has the array's id as its own job id, which by itself means all tasks."""


@pytest.mark.parametrize(
    ("code", "requeued", "array", "name"),
    [
        ("143", True, {}, JOB["SLURM_JOB_ID"]),
        ("0", False, {}, JOB["SLURM_JOB_ID"]),
        ("143", True, OF_AN_ARRAY, f"{JOB['SLURM_JOB_ID']}_3"),
        ("143", True, OF_AN_ARRAY | {"SLURM_ARRAY_JOB_ID": "1"}, JOB["SLURM_JOB_ID"]),
    ],
)
def test_before_the_time_is_up_ranks_are_asked_to_end_and_what_is_unfinished_is_queued_again(
    cluster, code, requeued, array, name
):
    environment = cluster.environment(nodes=2, STEP_RUNS=code, **array)
    process = cluster.start("slurm/train.sbatch", *RUN, environment=environment)
    until = time.monotonic() + 30
    while len(cluster.calls("accelerate")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert process.returncode == int(code), said
    assert [call["words"] for call in cluster.calls("scancel")] == [["--signal=TERM", name]]
    queued = [call["words"] for call in cluster.calls("scontrol") if call["words"][0] == "requeue"]
    assert queued == ([["requeue", name]] if requeued else [])


@pytest.mark.parametrize(("gpus", "alone"), [("1", True), ("2", False)])
def test_the_launcher_of_a_single_rank_outlives_the_signal_that_the_rank_saves_at(cluster, gpus, alone):
    environment = cluster.environment(nodes=1, SLURM_GPUS_ON_NODE=gpus, SLURM_JOB_NODELIST=NODES[0])
    cluster.run("slurm/train.sbatch", *RUN, environment=environment)
    (call,) = cluster.calls("accelerate")
    assert call["ignores"] == (["SIGTERM", "SIGUSR1"] if alone else [])


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "slurm/array.sbatch"])
def test_a_job_asks_to_be_told_in_time_and_to_be_queued_again(script):
    lines = (ROOT / "launch" / script).read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=B:USR1@300", "--open-mode=append", "--ntasks-per-node=1"} <= asked


def test_a_job_submitted_from_elsewhere_says_from_where_to_submit(cluster, tmp_path):
    finished = cluster.run(
        "slurm/train.sbatch", *RUN, environment=cluster.environment(SLURM_SUBMIT_DIR=str(tmp_path))
    )
    assert finished.returncode == 2
    assert "submit from the folder that holds launch/" in finished.stderr


@pytest.mark.parametrize("seed", ["0", "4"])
def test_every_element_of_an_array_trains_its_own_seed_in_its_own_folder(cluster, seed):
    environment = cluster.environment(SLURM_ARRAY_TASK_ID=seed)
    finished = cluster.run("slurm/array.sbatch", "runs/my seeds", *RUN, environment=environment)
    assert finished.returncode == 0, finished.stderr
    (call,) = cluster.calls("accelerate")
    assert call["words"][-2:] == [f"train.seed={seed}", f"train.output_dir=runs/my seeds/seed-{seed}"]


def test_an_array_without_a_folder_says_so(cluster):
    finished = cluster.run(
        "slurm/array.sbatch", *RUN, environment=cluster.environment(SLURM_ARRAY_TASK_ID="0")
    )
    assert finished.returncode == 2
    assert "give a folder for the runs" in finished.stderr
