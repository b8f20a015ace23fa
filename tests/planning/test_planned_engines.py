"""Each engine's memory, held to sums done by hand. Weights: a matrix of 100 and a bias of 10, fp32 unless said."""

from __future__ import annotations

from dataclasses import replace

from plain_runs import BIAS, MATRIX, phase_of, plain_run, steps_through

from swaft.planning.memory import Weight, adam_temporaries
from swaft.planning.replicated import replicated_memory
from swaft.planning.sharded import sharded_memory
from swaft.planning.zero3 import sub_groups, zero3_memory
from swaft.planning.zero12 import zero12_memory

BACKWARD, STEP = "forward and backward", "optimizer step"
HALF = (replace(MATRIX, itemsize=2), replace(BIAS, itemsize=2))


def test_one_process_holds_weights_moments_and_gradients():
    memory = replicated_memory(plain_run(), steps_through((0, 1), peak=1000), deepspeed=False)
    assert phase_of(memory, STEP) == {
        "weights": 440,
        "AdamW's moments": 880,
        "gradients": 440,
        "kept of the last micro-batch": 0,
        "AdamW's temporaries": 800,  # two of the matrix
    }
    # The last gradient to come is the matrix's: it is counted from the moment after, the end.
    assert phase_of(memory, BACKWARD)["gradients"] == 440
    assert phase_of(memory, BACKWARD)["activations"] == 1000
    assert memory.owned == 110


def test_ddp_holds_the_gradients_once_more_and_averages_a_slice():
    memory = replicated_memory(plain_run(world_size=4), steps_through((0, 1)), deepspeed=False)
    assert phase_of(memory, STEP)["DDP's buckets"] == 440
    assert memory.owned == 28


def test_gradients_that_accumulate_are_there_from_the_start():
    moments = steps_through((0, 1), peak=1000)
    moments[0] = replace(moments[0], peak_bytes=5000)  # fullest before there is any gradient
    once = replicated_memory(plain_run(), moments, deepspeed=False)
    often = replicated_memory(plain_run(accumulation_steps=2), moments, deepspeed=False)
    assert phase_of(once, BACKWARD)["gradients"] == 0
    assert phase_of(often, BACKWARD)["gradients"] == 440


def test_a_frozen_weight_has_neither_gradient_nor_moments():
    memory = replicated_memory(
        plain_run(replace(MATRIX, group=None), BIAS), [*steps_through((0,))][:4], deepspeed=False
    )
    rows = phase_of(memory, STEP)
    assert (rows["weights"], rows["AdamW's moments"], rows["gradients"]) == (440, 80, 40)


def test_stage_0_in_16_bits_has_masters_beside_the_weights():
    memory = replicated_memory(plain_run(*HALF, world_size=2), steps_through((0, 1)), deepspeed=True)
    rows = phase_of(memory, STEP)
    assert (rows["weights"], rows["fp32 masters"], rows["gradients, fp32"]) == (220, 440, 440)


def test_zero_2_cuts_the_optimizer_state_by_group_and_pads_it():
    run = plain_run(world_size=4)
    memory = zero12_memory(run, steps_through((0, 1)), {"reduce_bucket_size": 1000}, stage=2)
    # 100 is 4 partitions of 26, padded to a multiple of 8; 10 is 4 of 4
    assert memory.owned == 26 + 4
    rows = phase_of(memory, STEP)
    assert (rows["fp32 masters"], rows["AdamW's moments"]) == (120, 240)
    assert rows["weights"] == 4 * (104 + 16)
    # every partition touches the matrix and the bias, which are kept whole
    assert rows["gradients of the partition"] == 440
    assert rows["flat fp32 gradient"] == 104


def test_a_gradient_larger_than_the_bucket_waits_outside_of_it_and_is_copied_to_be_summed():
    run = plain_run(world_size=2)
    memory = zero12_memory(run, steps_through((0, 1)), {"reduce_bucket_size": 16}, stage=2)
    rows = phase_of(memory, BACKWARD)
    assert rows["copy for the sum"] == 400  # of two owners
    assert rows["gradients on their way"] == 400
    assert rows["reduce bucket"] == 64


def test_zero_1_keeps_all_gradients_until_backward_has_ended():
    memory = zero12_memory(plain_run(world_size=2), steps_through((0, 1)), {}, stage=1)
    assert phase_of(memory, BACKWARD)["gradients on their way"] == 440


def test_offloading_the_optimizer_moves_it_to_the_host():
    zero = {"offload_optimizer": {"device": "cpu"}}
    memory = zero12_memory(plain_run(*HALF, world_size=2, on_cpu=False), steps_through((0, 1)), zero, stage=2)
    (backward,) = memory.phases
    assert "fp32 masters" not in backward.device
    assert backward.host["fp32 masters"] == 4 * memory.owned
    assert backward.host["AdamW's moments"] == 8 * memory.owned


def test_zero_3_has_masters_beside_its_slices_in_fp32_too():
    whole = zero3_memory(plain_run(world_size=4), steps_through((0, 1)), {})
    half = zero3_memory(plain_run(*HALF, world_size=4), steps_through((0, 1)), {})
    assert whole.owned == half.owned == 25 + 3
    assert phase_of(whole, STEP)["fp32 masters"] == 4 * 28
    assert phase_of(half, STEP)["fp32 masters"] == 4 * 28
    assert phase_of(half, STEP)["slices of the weights"] == 2 * 28


def test_a_rank_of_zero_3_shrinks_with_the_number_of_ranks():
    large = Weight(numel=10**9, itemsize=2, group=0)
    sizes = [
        phase_of(zero3_memory(plain_run(large, world_size=w, on_cpu=False), [], {}), STEP)["fp32 masters"]
        for w in (1, 1000, 4000)
    ]
    assert sizes == [4 * 10**9, 4 * 10**6, 10**6]


def test_sub_groups_end_as_soon_as_they_are_full():
    assert sub_groups([3, 3, 3, 3], 5) == [[3, 3], [3, 3]]
    assert sub_groups([3, 3], 100) == [[3, 3]]


def test_fsdp2_cuts_by_rows_so_more_ranks_than_rows_help_no_further():
    moments = steps_through((0, 1))
    sizes = [
        sharded_memory(plain_run(world_size=w), moments, [0, 0], reshards=True).owned
        for w in (1, 5, 10, 1000)
    ]
    assert sizes == [110, 22, 11, 11]


def test_fsdp2_gathers_one_block_at_a_time():
    weights = [MATRIX] * 4
    run = plain_run(*weights, world_size=2, on_cpu=False)
    moments = steps_through((0,), (1,), (2,), (3,), peak=1)
    together = sharded_memory(run, moments, [0, 0, 0, 0], reshards=True)
    apart = sharded_memory(run, moments, [1, 2, 3, 4], reshards=True)
    assert phase_of(together, BACKWARD)["gathered weights"] == 1600
    assert phase_of(apart, BACKWARD)["gathered weights"] == 400


def test_adam_takes_two_of_the_largest_on_a_cpu_and_one_of_all_on_a_device():
    assert adam_temporaries([100, 10], on_cpu=True) == 800
    assert adam_temporaries([100, 10], on_cpu=False) == 440
