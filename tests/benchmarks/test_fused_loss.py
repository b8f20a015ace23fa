"""The benchmark of the fused loss, on tiny sizes: it runs, no figure is missing, and its yardsticks are right."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import fused_loss, fused_loss_speed
from benchmarks.fused_loss_clock import interleaved
from benchmarks.fused_loss_error import BARS, DIFFERENCE
from benchmarks.fused_loss_memory import OVER_BOTH, OVER_INPUTS, QUICK_SHAPE
from benchmarks.fused_loss_oracle import symmetric_kl
from benchmarks.fused_loss_rivals import (
    COMPILED,
    FLOOR,
    LIGER,
    LOGIT_STD,
    PLAIN,
    SWAFT,
    Operands,
    Shape,
    arms,
    forward_backward,
    make_operands,
    plain_divergence,
    plain_loss,
)
from benchmarks.fused_loss_speed import FIRST, LIMIT_BYTES, LIMIT_S, ROWS, VOCABULARIES, WIDTHS, too_much
from benchmarks.fused_loss_training_step import ONE_SIDED, PLAIN_STEP, TWO_SIDED, WHOLE_LOGITS

pytestmark = pytest.mark.unit
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU other arms and another clock")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "fused_loss.json"
    fused_loss.main(["--quick", "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def results(path):
    return json.loads(path.read_text())


def doubles(noise: float) -> Operands:
    return make_operands(Shape(9, 7, 31), dtype=torch.float64, device="cpu", noise=noise)


def divergence_of(operands: Operands) -> torch.Tensor:
    return plain_divergence(
        F.linear(operands.hidden, operands.weight), F.linear(operands.noised_hidden, operands.weight)
    )


@pytest.mark.parametrize("noise", [0.03, 1.0])
def test_the_oracle_agrees_with_autograd_of_the_plain_form_where_both_are_right(noise):
    operands = doubles(noise)
    truth = symmetric_kl(operands.hidden, operands.hidden - operands.noised_hidden, operands.weight)
    value, gradients = forward_backward(divergence_of, operands)
    torch.testing.assert_close(value, truth.value, rtol=1e-10, atol=0)
    for gradient, exact in zip(gradients, truth[1:], strict=True):
        assert (gradient - exact).norm() <= 1e-10 * exact.norm()


def test_the_oracle_does_not_depend_on_its_blocks(monkeypatch):
    operands = doubles(0.1)
    difference = operands.hidden - operands.noised_hidden
    whole = symmetric_kl(operands.hidden, difference, operands.weight)
    monkeypatch.setattr("benchmarks.fused_loss_oracle.BLOCK", 2 * len(operands.weight))
    for one, other in zip(symmetric_kl(operands.hidden, difference, operands.weight), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_plain_loss_is_cross_entropy_plus_the_divergence():
    operands = doubles(0.5)
    expected = F.cross_entropy(F.linear(operands.hidden, operands.weight), operands.labels)
    difference = operands.hidden - operands.noised_hidden
    expected = expected + symmetric_kl(operands.hidden, difference, operands.weight).value
    torch.testing.assert_close(plain_loss(operands), expected)


def test_the_floor_is_six_products_of_the_right_operands():
    operands = make_operands(Shape(5, 3, 11), dtype=torch.float64, device="cpu")
    floor = arms(operands, (FLOOR,))[FLOOR]
    hidden, noised, weight = (leaf.detach() for leaf in operands.leaves)
    noised_logits = noised @ weight.T
    found = floor().gradients
    torch.testing.assert_close(found[0], hidden @ weight.T @ weight)
    torch.testing.assert_close(found[1], noised_logits @ weight)
    torch.testing.assert_close(found[2], noised_logits.T @ (hidden + noised))


def test_operands_are_those_that_the_figures_speak_of():
    shape = Shape(400, 64, 500)
    operands = make_operands(shape, dtype=torch.bfloat16, device="cpu", noise=1e-4)
    hidden, difference = operands.hidden.detach().double(), operands.difference.double()
    logits = hidden @ operands.weight.detach().double().T
    assert logits.std().item() == pytest.approx(LOGIT_STD, rel=0.05)
    assert difference.std().item() == pytest.approx(1e-4, rel=0.05)
    torch.testing.assert_close(
        operands.noised_hidden.detach().double(), hidden - difference, rtol=4e-3, atol=1e-6
    )
    assert shape.gemm_operations == 12 * 400 * 64 * 500


@on_cpu
def test_every_way_to_the_loss_has_a_time_and_finds_the_same_loss(results):
    for found in results["speed"]["by shape"].values():
        assert found["arms"].keys() == {SWAFT, PLAIN, FLOOR, COMPILED}
        assert found["arms"][SWAFT]["loss"] == pytest.approx(found["arms"][PLAIN]["loss"], rel=1e-5)
        for name in (SWAFT, PLAIN, FLOOR):
            assert found["arms"][name]["seconds"]["median"] > 0
            assert found["arms"][name][f"{PLAIN} / this"]["median"] > 0
            assert found["arms"][name]["share of the floor"]["median"] > 0
        assert "skipped" in found["arms"][COMPILED]


def test_a_rival_that_cannot_run_here_is_reported_so():
    operands = make_operands(Shape(2, 3, 4), dtype=torch.float32, device="cpu")
    assert all("liger" in reason for reason in arms(operands, LIGER).values())


def test_a_failing_arm_is_noted_and_the_others_go_on():
    def fails():
        raise ValueError("no compiler\nat all")

    timings = interleaved(
        {"fails": fails, "absent": "not installed", "runs": lambda: 1.0},
        warm_up=1,
        rounds=3,
        allowance_s=10.0,
        may_fail=("fails",),
    )
    assert timings.skipped == {"fails": "ValueError: no compiler", "absent": "not installed"}
    assert timings.seconds.keys() == {"runs"}
    assert len(timings.seconds["runs"]) == 3
    with pytest.raises(ValueError, match="no compiler"):
        interleaved({"fails": fails}, warm_up=0, rounds=1, allowance_s=1.0)


def test_no_round_is_begun_that_the_allowance_has_no_room_for():
    timings = interleaved({"runs": lambda: None}, warm_up=2, rounds=50, allowance_s=0.0)
    assert len(timings.seconds["runs"]) == 1


def test_what_does_not_fit_is_left_out_with_the_reason():
    assert too_much(Shape(256, 512, 32128), rate=1e11) is None
    assert f"limit {LIMIT_S:.0f}" in too_much(Shape(256, 1024, 250112), rate=1e9)
    assert f"limit {LIMIT_BYTES / 1e9:.0f}" in too_much(Shape(256, 4096, 250112), rate=1e14)


@on_cpu
def test_the_peak_of_the_plain_loss_holds_its_logits_and_not_the_process(results):
    one_matrix = 4 * QUICK_SHAPE.rows * QUICK_SHAPE.vocabulary
    found = results["memory"]["by shape"][QUICK_SHAPE.name]
    assert found.keys() == {SWAFT, PLAIN}
    if "skipped" in found[PLAIN]:
        pytest.skip(found[PLAIN]["skipped"])
    assert 4 * one_matrix < found[PLAIN][OVER_INPUTS] < 16 * one_matrix
    for arm in found.values():
        width = QUICK_SHAPE.width
        assert arm["bytes of gradients"] == 4 * width * (2 * QUICK_SHAPE.rows + QUICK_SHAPE.vocabulary)
        assert arm[OVER_BOTH] == arm[OVER_INPUTS] - arm["bytes of gradients"]


def test_the_difference_form_is_right_at_every_noise_and_the_plain_form_is_not(results):
    by_dtype = results["error"]["by dtype"]
    assert by_dtype.keys() == BARS.keys()
    for dtype, bound in BARS.items():
        for noise, errors in by_dtype[dtype].items():
            assert max(errors[DIFFERENCE].values()) < bound, (dtype, noise)
        assert by_dtype[dtype]["1e-06"]["plain"]["value"] > 1
        assert by_dtype[dtype]["1"]["plain"]["value"] < bound


@on_cpu
def test_chunks_change_the_last_bits_only(results):
    found = results["chunks"]["by chunk_bytes"]
    assert len(found) == 4
    for arm in found.values():
        assert arm["seconds"]["median"] > 0
        assert max(arm["relative distance from the largest chunk"].values()) < 1e-5


def test_a_training_step_of_each_objective_is_measured_against_a_plain_one(results):
    found = results["training_step"]["arms"]
    assert found.keys() == {PLAIN_STEP, TWO_SIDED, ONE_SIDED, WHOLE_LOGITS}
    assert found[PLAIN_STEP]["this / plain step"]["median"] == 1
    for arm in found.values():
        assert arm["this / plain step"]["median"] > 0
        assert arm["loss"] == pytest.approx(found[PLAIN_STEP]["loss"], rel=0.1)


def test_one_section_measured_again_leaves_the_others_as_they_were(results, path):
    fused_loss.main(["--quick", "--section", "chunks", "--out", str(path)])
    again = json.loads(path.read_text())
    assert {name: part for name, part in again.items() if name != "chunks"} == {
        name: part for name, part in results.items() if name != "chunks"
    }
    assert again["chunks"] != results["chunks"]


def test_on_a_card_the_shapes_that_have_bars_come_first_and_every_shape_comes_once(monkeypatch):
    order = []
    monkeypatch.setattr(
        fused_loss_speed, "within", lambda name, *_: order.append(name.removeprefix("speed ")) or {}
    )
    monkeypatch.setattr(fused_loss_speed, "release", lambda: None)
    fused_loss_speed.measure(quick=False, device="cuda")
    assert order[: len(FIRST)] == [shape.name for shape in FIRST]
    every = {Shape(ROWS["cuda"], width, size).name for width in WIDTHS for size in VOCABULARIES}
    assert sorted(order) == sorted(every)
