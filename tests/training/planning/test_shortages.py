"""What does not fit is told with the settings that would help this run, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swaft.averaging.rules import PowerEMA
from swaft.training.config import AveragingConfig, TrainConfig
from swaft.training.planning import plan
from swaft.training.planning.memory import Phase
from swaft.training.planning.plan import RunPlan, find_shortages

pytestmark = pytest.mark.unit

GIB = 2**30


def told(
    phase: str,
    *,
    stage: int | None = 2,
    ranks: int = 8,
    offloads: tuple[bool, bool] = (False, False),
    host: bool = False,
    **train: Any,
) -> str:
    """The one shortage of a run that takes 3 GiB in this phase, where 2 are there."""
    found = RunPlan(
        engine="-", precision="bf16", world_size=ranks, machines=1, on_cpu=False, parameters=1, trainable=1,
        phases=[Phase(phase, {"a": 3 * GIB}, {"b": 3 * GIB // ranks})], averaging=None,
    )  # fmt: skip
    launch = SimpleNamespace(stage=stage, engine="-", world_size=ranks, num_machines=1)
    offloaded = dict(zip(("optimizer", "param"), offloads, strict=True))
    engine: Any = SimpleNamespace(launch=launch, offloads=offloaded.get, loads_whole=True, on_cpu=False)
    there = (
        {"device_bytes": None, "host_bytes": 2 * GIB}
        if host
        else {"device_bytes": 2 * GIB, "host_bytes": None}
    )
    config = SimpleNamespace(train=TrainConfig(output_dir="-", **train), averaging=AveragingConfig())
    [sentence] = find_shortages(found, engine, config, **there)
    return sentence


def test_a_machine_holds_what_its_own_ranks_take_at_their_fullest():
    phases = [Phase("start", {}, {"b": 5}), Phase("step", {"a": 7, "c": 1}, {"b": 3})]
    found = RunPlan(
        engine="-", precision="bf16", world_size=8, machines=2, on_cpu=False, parameters=1, trainable=1,
        phases=phases, averaging=None,
    )  # fmt: skip
    assert (found.device_bytes, found.host_bytes, found.machine_bytes) == (8, 5, 4 * 5)
    engine, config = SimpleNamespace(launch=None), SimpleNamespace(train=None)
    assert find_shortages(found, engine, config, device_bytes=8, host_bytes=20) == []  # it fits to the byte


@pytest.mark.parametrize(("offloaded", "copied"), [(False, 4000), (True, 0)])
def test_averaging_takes_its_time_of_that_between_two_members_and_copies_what_is_not_on_the_host(
    offloaded, copied, monkeypatch
):
    monkeypatch.setattr(plan, "seconds_an_element", lambda workers, elements: 1e-3)
    engine: Any = SimpleNamespace(on_cpu=False, offloads=lambda part: offloaded)
    config = SimpleNamespace(averaging=AveragingConfig())
    # Each member moves two means: 2000 ms of work every 4 steps.
    rule = PowerEMA(sigma_rel=(0.1, 0.2), every=4).plan(100)
    taken = [plan._plan_averaging(rule, config, 1000, engine, seconds) for seconds in (None, 0.4, 0.8)]
    assert [each.event_seconds for each in taken] == [2.0, 2.0, 2.0]
    assert [each.share_of_step for each in taken] == [None, pytest.approx(1.25), pytest.approx(0.625)]
    assert [each.waits for each in taken] == [None, True, False]
    assert {(each.copied_bytes, each.pinned_bytes > 0) for each in taken} == {(copied, not offloaded)}


def test_activations_are_made_smaller_where_they_are_in_the_way():
    batch = "train.per_device_train_batch_size below 16 with train.gradient_accumulation_steps above 1"
    assert batch in told("forward and backward")
    assert "train.gradient_checkpointing=true" in told("forward and backward")
    small = told("forward and backward", per_device_train_batch_size=1, gradient_checkpointing=True)
    for sentence in (small, told("optimizer step")):
        assert "batch_size" not in sentence
        assert "checkpointing" not in sentence


@pytest.mark.parametrize(
    ("stage", "offloads", "expected"),
    [
        (None, (False, False), "what helps: a higher ZeRO stage (launch/accelerate/zero3.yaml)"),
        (
            2,
            (False, False),
            "zero3.yaml) or offloading (--deepspeed_config_file ds_configs/zero2_offload.json)",
        ),
        (2, (True, False), "what helps: a higher ZeRO stage (launch/accelerate/zero3.yaml)"),
        (
            3,
            (False, False),
            "what helps: more ranks or offloading (--deepspeed_config_file ds_configs/zero3_off",
        ),
        (3, (True, False), "ds_configs/zero3_offload_param.json"),
        (3, (True, True), "what helps: more ranks"),
    ],
)
def test_state_is_spread_further_or_moved_to_the_host_as_far_as_it_is_not_yet(stage, offloads, expected):
    sentence = told("optimizer step", stage=stage, offloads=offloads)
    assert sentence.startswith("a device would take 3.00 GiB, and --device_memory is 2.00 GiB; ")
    assert expected in sentence


def test_a_machine_that_is_full_while_models_load_is_told_how_not_to():
    sentence = told("start", stage=3, host=True)
    assert sentence.startswith("the 8 ranks of a machine would take 3.00 GiB")
    assert "zero3_init_flag: true in the launch file or fewer ranks on each machine" in sentence
    assert "zero3_init_flag" not in told("start", stage=2, host=True)
    assert "more than that in --host_memory" in told("start", stage=2, ranks=1, host=True)
