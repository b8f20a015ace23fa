"""What a checkpoint says about its run, and which runs may go on with it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from swaft.errors import ConfigError, StateError
from swaft.training.run.record import (
    RunRecord,
    Setup,
    batches_read,
    changed_settings,
    require_same_run,
)

pytestmark = pytest.mark.unit

CHECKPOINT = Path("run/checkpoint-7")
SETUP = Setup(
    stage=None,
    world_size=2,
    per_device_train_batch_size=8,
    rows_per_step=32,
    grouped_by=None,
    total_steps=100,
    rows=400,
    rows_sha256="a" * 64,
    architecture_sha256="d" * 64,
    frozen_sha256="b" * 64,
    seed=0,
)
RECORD = RunRecord(
    setup=SETUP,
    settings={"train.learning_rate": 1e-3, "train.output_dir": "run"},
    applied_steps=7,
    weights="1",
    parts={
        "position": {"step": 7, "epoch": 0, "batches": 6, "evaluated": True, "stopped": False},
        "objective": {"step": 14},
        "meter": {"names": ["loss"], "seconds": 1.5, "logged_at_s": 1.25},
    },
    versions={"torch": "2.13.0"},
)


def test_a_record_is_read_back_from_json_as_it_was():
    assert RunRecord.read(json.loads(json.dumps(asdict(RECORD))), CHECKPOINT) == RECORD


@pytest.mark.parametrize("change", ["fewer", "more", "setup"])
def test_a_record_of_other_fields_is_refused_by_name(change):
    content = asdict(RECORD)
    if change == "fewer":
        del content["weights"]
    elif change == "more":
        content["mood"] = 1
    else:
        content["setup"] = 3
    with pytest.raises(StateError, match=r"checkpoint-7/manifest\.json: content.*written by another version"):
        RunRecord.read(content, CHECKPOINT)


def test_what_an_older_version_wrote_is_refused_in_one_line():
    content = asdict(RECORD)
    del content["parts"]
    older = {"position": {"step": 7}, "objective_step": 14, "best": None, "scaler": None, "seconds": 1.5}
    with pytest.raises(StateError, match="another version of swaft; resume it with that version") as caught:
        RunRecord.read(content | older | {"logged_at_s": 1.25}, CHECKPOINT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("total_steps", 101, "train.max_steps"),
        ("rows", 401, "section data"),
        ("rows_sha256", "c" * 64, "section data"),
        ("architecture_sha256", "c" * 64, "section model"),
        ("frozen_sha256", "c" * 64, "section model"),
        ("seed", 1, "train.seed"),
    ],
)
def test_another_run_is_refused_with_what_differs(name, value, setting):
    told = f"{value[:12]}..." if isinstance(value, str) else value
    with pytest.raises(ConfigError, match=f"{name} = .*this one has {told}; set {setting}.* as it was"):
        require_same_run(RECORD, replace(SETUP, **{name: value}), CHECKPOINT)
    require_same_run(RECORD, SETUP, CHECKPOINT)


def test_a_run_that_is_longer_because_there_are_fewer_ranks_is_told_how_to_take_as_many_rows_a_step():
    alone = replace(SETUP, world_size=1, rows_per_step=16, total_steps=200)
    with pytest.raises(ConfigError) as caught:
        require_same_run(RECORD, alone, CHECKPOINT)
    assert (
        "total_steps = 100, this one has 200; set train.per_device_train_batch_size or gradient_accumulation_steps "
        "so that their product with the ranks, 1 now and 2 before, is 32 rows a step (it is 16)"
    ) in str(caught.value)


def test_rows_that_differ_in_number_are_told_once():
    with pytest.raises(ConfigError) as caught:
        require_same_run(RECORD, replace(SETUP, rows=9, rows_sha256="c" * 64), CHECKPOINT)
    assert "rows_sha256" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "now", "fits"),
    [
        ((None, 2), (None, 5), True),
        ((2, 2), (2, 2), True),
        ((2, 2), (2, 4), False),
        ((2, 2), (3, 2), False),
        ((2, 2), (None, 2), False),
        ((None, 2), (3, 2), False),
    ],
)
def test_an_optimizer_state_fits_the_engine_that_wrote_it(before, now, fits):
    was, setup = (replace(SETUP, stage=stage, world_size=size) for stage, size in (before, now))
    if fits:
        require_same_run(replace(RECORD, setup=was), setup, CHECKPOINT)
        return
    with pytest.raises(
        StateError, match=r"was written under .*load_state\('run/checkpoint-7/average', same_w"
    ):
        require_same_run(replace(RECORD, setup=was), setup, CHECKPOINT)


def test_settings_that_have_changed_are_named_and_the_folder_is_none_of_them():
    now = {"train.learning_rate": 2e-3, "train.output_dir": "other", "noise.kind": "r3f"}
    assert list(changed_settings(RECORD, SETUP, now)) == [
        "noise.kind: None before, r3f now",
        "train.learning_rate: 0.001 before, 0.002 now",
    ]
    assert not list(changed_settings(RECORD, SETUP, RECORD.settings))


def test_a_step_of_fewer_rows_is_told_although_no_setting_has_changed():
    (told,) = changed_settings(RECORD, replace(SETUP, world_size=1, rows_per_step=16), RECORD.settings)
    assert told.startswith("rows of an optimizer step: 32 before, 16 now")


@pytest.mark.parametrize(("world_size", "size", "batches"), [(2, 8, 6), (1, 8, 12), (3, 8, 4), (4, 4, 6)])
def test_the_rows_that_were_read_are_counted_in_the_new_batches(world_size, size, batches):
    now = replace(SETUP, world_size=world_size, per_device_train_batch_size=size)
    assert batches_read(RECORD, now) == batches


def test_a_pass_that_has_been_read_is_one_in_batches_that_do_not_divide_it():
    uneven = replace(SETUP, rows=95, world_size=1, per_device_train_batch_size=16)
    read = replace(
        RECORD, setup=uneven, parts={**RECORD.parts, "position": {**RECORD.parts["position"], "batches": 6}}
    )
    assert batches_read(read, replace(uneven, world_size=5)) == 2
    assert batches_read(read, replace(uneven, world_size=5, grouped_by=80)) == 2


def test_half_a_batch_is_refused():
    with pytest.raises(
        ConfigError, match=r"stands at row 96 of a pass, which is not a whole number .* of 40 rows"
    ):
        batches_read(RECORD, replace(SETUP, world_size=5))


def test_rows_grouped_by_length_cannot_be_grouped_otherwise_within_a_pass():
    with pytest.raises(ConfigError, match="grouped by None, but this run groups them by 16"):
        batches_read(RECORD, replace(SETUP, grouped_by=16))
    position = {**RECORD.parts["position"], "batches": 0}
    between = replace(RECORD, parts={**RECORD.parts, "position": position})
    assert batches_read(between, replace(SETUP, grouped_by=16)) == 0
