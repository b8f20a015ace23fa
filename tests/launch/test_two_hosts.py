"""ZeRO-3 on two hosts, started on each by launch.sh, over a network between them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_inputs import save_model, save_rows
from two_hosts import INTERFACE, Job, TwoHosts, reason_not_to_try

ROOT = Path(__file__).parents[2]
REASON = reason_not_to_try()
MULTINODE = "launch/accelerate/zero3_multinode.yaml"
RUN_S, END_S, SILENCE_S = 200, 30, 15
"""Seconds a whole run may take on a busy machine, in which a run that lost a host has to end, and that it waits for
one that says nothing."""

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_rows(folder / "train.csv", 30, seed=1)
    save_rows(folder / "validation.csv", 11, seed=2)
    (folder / "run.yaml").write_text(
        f"""\
model: {{model_name_or_path: {folder / "model"}}}
data: {{train_file: {folder / "train.csv"}, validation_file: {folder / "validation.csv"}, max_seq_length: 16}}
train: {{per_device_train_batch_size: 4, num_train_epochs: 3, learning_rate: 5.0e-3, logging_steps: 1}}
averaging: {{rule: swa, start: 0.25}}
eval: {{eval_steps: 6}}
"""
    )
    return folder


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as joined:
        yield joined


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "SLURM"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return (
        kept | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"} | more
    )


def command(*launch: str, inputs: Path, output: Path, more: tuple[str, ...] = ()) -> list[str]:
    recipe = ["recipes/classification.py", "--config", str(inputs / "run.yaml"), f"train.output_dir={output}"]
    return [str(ROOT / "launch" / "launch.sh"), *launch, *recipe, *more]


def start(hosts: TwoHosts, host: int, inputs: Path, output: Path, *more: str) -> Job:
    launch = ("--hosts", ",".join(hosts.addresses), "--gpus-per-node", "1", "--rank", str(host), MULTINODE)
    return hosts.start(
        host,
        command(*launch, inputs=inputs, output=output, more=more),
        environment(GLOO_SOCKET_IFNAME=INTERFACE),
        output.with_name(f"host{host}.log"),
    )


def metrics(output: Path) -> list[dict]:
    """All that was logged, without what a clock decides."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in each.items() if "second" not in name} for each in records]


def test_two_hosts_train_and_average_bit_for_bit_as_one_host_with_two_ranks(hosts, inputs, tmp_path):
    apart, together = tmp_path / "apart", tmp_path / "together"
    jobs = [start(hosts, host, inputs, apart) for host in (0, 1)]
    for job in jobs:
        assert job.wait(RUN_S) == 0, job.output
    launch = ("--gpus-per-node", "2", "--port", "0", "launch/accelerate/zero3.yaml")
    alone = Job(command(*launch, inputs=inputs, output=together), environment(), tmp_path / "together.log")
    assert alone.wait(RUN_S) == 0, alone.output

    assert "Ranks = 2 on cpu" in jobs[0].output
    assert json.loads((apart / "summary.json").read_text())["num_averaged"] > 1
    swapped = [record for record in metrics(apart) if record["kind"] == "validation/averaged"]
    assert len(swapped) >= 2  # in the middle of training and at its end
    for folder in ("final", "final-averaged"):
        weights = [(output / folder / "model.safetensors").read_bytes() for output in (apart, together)]
        assert weights[0] == weights[1], folder
    assert metrics(apart) == metrics(together)


def start_and_wait_for_training(hosts: TwoHosts, inputs: Path, output: Path, *more: str) -> list[Job]:
    jobs = [start(hosts, host, inputs, output, "train.num_train_epochs=1000", *more) for host in (0, 1)]
    until = time.monotonic() + RUN_S
    while "step 5/" not in jobs[0].output:
        assert {job.code for job in jobs} == {None}, jobs[0].output + jobs[1].output
        assert time.monotonic() < until, jobs[0].output
        time.sleep(0.1)
    return jobs


def require_clean_end(job: Job, output: Path, message: str) -> None:
    """What is said is what happened and what to look at, and the launcher says it once more, last."""
    said = job.output
    assert len(re.findall(rf"^error.*: other ranks {message}", said, re.MULTILINE)) == 1, said
    last = said[said.index("Root Cause") :]
    assert f"other ranks {message}" in last
    assert "the network to its machine is cut" in said
    assert "swaft/training" not in said  # no traceback of ours
    assert not (output / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_lost_ends_the_run_on_the_other_soon_and_with_a_message(hosts, inputs, tmp_path, lost):
    output = tmp_path / "run"
    left = start_and_wait_for_training(hosts, inputs, output)[1 - lost]
    hosts.power_off(lost)
    assert left.wait(END_S) != 0
    require_clean_end(left, output, "are gone")


def test_a_host_whose_cable_is_pulled_ends_the_run_on_both_soon_and_with_a_message(hosts, inputs, tmp_path):
    output = tmp_path / "run"
    jobs = start_and_wait_for_training(
        hosts, inputs, output, f"train.ddp_timeout={SILENCE_S}", "averaging.start=1"
    )
    hosts.pull_the_cable()
    until = time.monotonic() + SILENCE_S + END_S
    for job in jobs:
        assert job.wait(until - time.monotonic()) != 0
        require_clean_end(job, output, "did not answer within train.ddp_timeout seconds")
    assert "of 2 ranks these said nothing for 5 s: 1" in jobs[0].output
    assert "where the ranks met, does not answer: look first at the machine of rank 0" in jobs[1].output


def test_a_host_that_never_joins_is_waited_for_as_long_as_told(hosts, tmp_path):
    jobs = []
    for host, port in enumerate((29500, 29501)):  # each waits where the other is not
        where = ("--main_process_ip", hosts.addresses[0], "--main_process_port", str(port))
        number = ("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(host))
        launch = ["accelerate", "launch", "--config_file", str(ROOT / MULTINODE), *number, *where]
        words = [*launch, "--rdzv_conf", "timeout=3", str(ROOT / "recipes" / "classification.py")]
        jobs.append(hosts.start(host, words, environment(), tmp_path / f"host{host}.log"))
    first, second = jobs
    assert first.wait(RUN_S) != 0
    assert "1/2 clients joined" in first.output
    assert second.wait(RUN_S) != 0
    assert re.search(r"timed out .* connect to \(10\.77\.0\.1, 29501\)", second.output)
