"""Each engine's memory, held to sums done by hand. Weights: a matrix of 100 and a bias of 10, fp32 unless said."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from plain_runs import BIAS, MATRIX, phase_of, phases, plain_run, zero

from swaft.training.launch.accelerator import EngineSettings
from swaft.training.planning.memory import PlannedEngine, fsdp2, replicated, zero3, zero12
from swaft.training.planning.step import Weight

pytestmark = pytest.mark.unit

BACKWARD, STEP = "forward and backward", "optimizer step"
HALF = (replace(MATRIX, itemsize=2), replace(BIAS, itemsize=2))
LAYERS = [replace(MATRIX) for _ in range(4)]


def test_one_process_holds_weights_moments_and_gradients():
    memory = replicated(plain_run(), deepspeed=False)
    assert phase_of(memory, STEP) == {
        "weights": 440,
        "AdamW's moments": 880,
        "gradients": 440,
        "AdamW's temporaries": 800,  # two of the matrix
    }
    assert (
        phase_of(memory, BACKWARD, peak=1000)["activations"] == 1000
    )  # as backward begins, which is more than the gradients
    small = phase_of(memory, BACKWARD, peak=100)
    assert small["gradients"] == 440  # as it ends
    assert "activations" not in small
    assert memory[1] == 110


def test_ddp_holds_the_gradients_once_more_and_averages_a_slice():
    memory = replicated(plain_run(world_size=4), deepspeed=False)
    assert phase_of(memory, STEP)["DDP's buckets"] == 440
    assert memory[1] == 28


def test_gradients_that_accumulate_are_there_from_the_start():
    def as_backward_begins(**settings):
        return phase_of(replicated(plain_run(**settings), deepspeed=False), BACKWARD, peak=5000)

    assert "gradients" not in as_backward_begins()
    assert as_backward_begins(accumulates=True)["gradients"] == 440


def test_a_frozen_weight_has_neither_gradient_nor_moments():
    memory = replicated(plain_run(replace(MATRIX, trained=False), BIAS), deepspeed=False)
    rows = phase_of(memory, STEP)
    assert (rows["weights"], rows["AdamW's moments"], rows["gradients"]) == (440, 80, 40)


def test_stage_0_in_16_bits_has_masters_beside_the_weights():
    rows = phase_of(replicated(plain_run(*HALF, world_size=2), deepspeed=True), STEP)
    assert (rows["weights"], rows["fp32 masters"], rows["gradients, fp32"]) == (220, 440, 440)


def test_zero_2_cuts_the_optimizer_state_into_as_many_parts_as_ranks():
    memory = zero12(plain_run(world_size=4), zero(stage=2, reduce_bucket_size=1000))
    assert memory[1] == 28  # a quarter of 110
    rows = phase_of(memory, STEP)
    assert (rows["fp32 masters"], rows["AdamW's moments"]) == (112, 224)
    assert rows["weights"] == 440
    # the partition touches the matrix, which is kept whole
    assert rows["gradients of the partition"] == 400
    assert rows["flat fp32 gradient"] == 112


def test_a_bucket_is_as_large_as_the_settings_say_and_a_large_gradient_lies_outside_of_it():
    rows = phase_of(zero12(plain_run(world_size=2), zero(stage=2, reduce_bucket_size=16)), BACKWARD)
    assert rows["gradients of the partition"] == 400
    assert rows["reduce bucket"] == 64


def test_zero_1_keeps_all_gradients_until_backward_has_ended():
    rows = phase_of(zero12(plain_run(world_size=2), zero(stage=1)), BACKWARD)
    assert (rows["gradients"], rows["gradients of the partition"]) == (440, 400)
    assert rows["reduce bucket"] == 440  # as much of it as is ever written to


def test_zero_1_that_sums_as_backward_goes_has_a_second_bucket_and_no_gradients_that_wait():
    rows = phase_of(zero12(plain_run(world_size=2), zero(stage=1, overlap_comm=True)), BACKWARD)
    assert rows["reduce bucket"] == 2 * 440
    assert "gradients" not in rows


def test_gradients_of_micro_batches_before_lie_beside_those_of_the_last():
    run = plain_run(world_size=2, accumulates=True)
    assert phase_of(zero12(run, zero(stage=2)), BACKWARD)["gradients of the partition"] == 800
    assert phase_of(zero12(run, zero(stage=2)), STEP)["gradients of the partition"] == 400
    begins = phase_of(zero12(run, zero(stage=1)), BACKWARD, peak=5000)
    assert begins["gradients of the partition"] == 400  # the last are not summed yet


def test_stage_0_sums_a_flat_copy_of_the_gradients():
    assert (
        phase_of(replicated(plain_run(*HALF, world_size=2), deepspeed=True), BACKWARD)[
            "flat copy for the sum"
        ]
        == 2 * 110
    )
    alone = phase_of(replicated(plain_run(*HALF), deepspeed=True), BACKWARD)
    assert "flat copy for the sum" not in alone
    large = plain_run(Weight(numel=10**9, itemsize=2), world_size=2)
    rows = phase_of(replicated(large, deepspeed=True), BACKWARD)
    assert rows["flat copy for the sum"] == 2 * 5 * 10**8  # half of them at a time


def test_offloading_the_optimizer_moves_it_to_the_host():
    run = plain_run(*HALF, world_size=2, on_cpu=False)
    memory = zero12(run, zero(stage=2, offload_optimizer={"device": "cpu"}))
    [backward] = phases(memory).values()
    assert "fp32 masters" not in backward.device
    assert backward.host["fp32 masters"] == 4 * memory[1]
    assert backward.host["AdamW's moments"] == 8 * memory[1]
    assert backward.device["offload buffer"] == backward.host["its copy on the host"] == 2 * 100
    assert backward.host["fp32 gradients"] == 4 * memory[1]
    assert backward.host["staging of the weights"] == 2 * memory[1]


@pytest.mark.parametrize("parts", [("optimizer",), ("optimizer", "param")])
def test_zero_3_moves_to_the_host_what_it_is_told_to(parts):
    settings = {f"offload_{part}": {"device": "cpu"} for part in parts}
    memory = zero3(plain_run(*HALF, world_size=2, on_cpu=False), zero(stage=3, **settings))
    [backward] = phases(memory).values()
    state = {
        "fp32 masters": 4 * 55,
        "AdamW's moments": 8 * 55,
        "gradient slices": 2 * 55,
        "fp32 gradients": 4 * 55,
    }
    weights = {"slices of the weights": 2 * 55}
    assert backward.host == (state | weights if "param" in parts else state)
    assert ("slices of the weights" in backward.device) == ("param" not in parts)


def test_zero_3_has_masters_beside_its_slices_in_fp32_too():
    whole = zero3(plain_run(world_size=4), zero())
    half = zero3(plain_run(*HALF, world_size=4), zero())
    assert whole[1] == half[1] == 25 + 3
    assert phase_of(whole, STEP)["fp32 masters"] == 4 * 28
    assert phase_of(half, STEP)["fp32 masters"] == 4 * 28
    assert phase_of(half, STEP)["slices of the weights"] == 2 * 28


def test_a_rank_of_zero_3_shrinks_with_the_number_of_ranks():
    large = Weight(numel=10**9, itemsize=2)
    runs = [plain_run(large, world_size=ranks, on_cpu=False) for ranks in (1, 1000, 4000)]
    sizes = [phase_of(zero3(run, zero()), STEP)["fp32 masters"] for run in runs]
    assert sizes == [4 * 10**9, 4 * 10**6, 10**6]


@pytest.mark.parametrize(
    ("reuse", "prefetch", "held"),
    [
        (10**9, 0, 1600),  # within the reuse distance the model is whole when its forward has ended
        (0, 0, 400),  # beyond it one layer is
        (0, 100, 800),  # and what is fetched ahead
        (200, 0, 800),  # half of the distance lies before the turn
    ],
)
def test_zero_3_gathers_what_is_used_again_soon_and_what_comes_next(reuse, prefetch, held):
    entries = zero(
        stage3_param_persistence_threshold=0,
        stage3_max_reuse_distance=reuse,
        stage3_prefetch_bucket_size=prefetch,
    )
    run = plain_run(*LAYERS, world_size=2, on_cpu=False)
    assert phase_of(zero3(run, entries), BACKWARD, peak=10**6)["gathered weights"] == held


def test_a_sub_group_of_zero_3_ends_once_it_is_full():
    def flat(most):
        memory = zero3(plain_run(*LAYERS, world_size=2), zero(sub_group_size=most))
        return phase_of(memory, STEP)["flat fp32 gradient"]

    assert flat(10**9) == 4 * 200  # all of a rank's slices
    assert flat(60) == 4 * (60 + 50)  # at most one slice more than it asks for


def test_fsdp2_cuts_by_rows_so_more_ranks_than_rows_help_no_further():
    sizes = [fsdp2(plain_run(world_size=ranks), reshards=True)[1] for ranks in (1, 5, 10, 1000)]
    assert sizes == [110, 22, 11, 11]


def test_fsdp2_gathers_one_block_at_a_time():
    def gathered(blocks, *, reshards=True):
        run = plain_run(*LAYERS, world_size=2, on_cpu=False, blocks=blocks)
        return phase_of(fsdp2(run, reshards=reshards), BACKWARD, peak=10**6)["gathered weights"]

    assert gathered([0, 0, 0, 0]) == 1600
    assert gathered([1, 2, 3, 4]) == 400 + 400  # the block, and the buffer that it came in
    assert gathered([1, 2, 3, 4], reshards=False) == 1600 + 400


def test_fsdp2_frees_a_block_before_its_gradients_are_summed():
    embedding, layer = Weight(numel=1000, rows=10, itemsize=4), MATRIX
    run = plain_run(embedding, layer, world_size=2, on_cpu=False, blocks=[1, 2])
    rows = phase_of(fsdp2(run, reshards=True), BACKWARD)
    # At the end 8 bytes an element of the embedding, to copy its gradient in and sum it, and no weights.
    assert rows["gathered weights"] == 0
    assert rows["gradient on its way"] == 8000
    assert rows["gradients"] == 4 * (500 + 50)
    frozen = plain_run(replace(embedding, trained=False), layer, world_size=2, on_cpu=False, blocks=[1, 2])
    assert phase_of(fsdp2(frozen, reshards=True), BACKWARD)["gradient on its way"] == 8 * 100


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_run_begins_with_the_whole_model_in_fp32_and_has_all_of_it_on_the_host_if_it_computes_there(on_cpu):
    launch: Any = SimpleNamespace(stage=None, world_size=2)
    engine = PlannedEngine(
        launch, EngineSettings(precision="bf16", deepspeed=None, fsdp2=None), on_cpu=on_cpu
    )
    (start, *steps), _ = engine.memory((MATRIX, BIAS), 1000, accumulates=False)
    assert (start.device, start.host) == ({}, {"model as loaded, fp32": 440})
    for phase in steps:
        assert (phase.device if on_cpu else phase.host) == {}
        assert (phase.host if on_cpu else phase.device)["AdamW's moments"] == 880


def test_adam_takes_two_of_the_largest_on_a_cpu_and_one_of_all_on_a_device():
    assert plain_run().adam(100, 10).size == 800
    assert plain_run(on_cpu=False).adam(100, 10).size == 440
