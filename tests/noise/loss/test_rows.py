from __future__ import annotations

import pytest
import torch
from float64_rows import expected
from loss_oracle import cross_entropy, naive, relative_error

from benchmarks.fused_loss_oracle import closed_form
from swaft.noise.loss import rows as row_module
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowGradients, RowInputs, RowStatistics, rows, task_rows

pytestmark = pytest.mark.unit

ROWS = 12
NONE_COUNT = torch.zeros(ROWS)
ALL_COUNT = torch.ones(ROWS)


def logits(classes: int, spread: float, *, offset: float = 0.0, peak: float = 0.0, dtype=torch.float32):
    """Clean logits, noised minus clean ones, labels; every label raised by ``peak``."""
    generator = torch.Generator().manual_seed(0)
    z = 2.5 * torch.randn(ROWS, classes, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (ROWS,), generator=generator)
    z[torch.arange(ROWS), labels] += peak
    noise = spread * torch.randn(ROWS, classes, generator=generator, dtype=dtype) + offset
    return z, noise, labels


def run(
    z, noise, labels, *, ce=NONE_COUNT, kl=ALL_COUNT, bias=None, **options
) -> tuple[RowStatistics, RowGradients]:
    gradients = RowGradients(*(torch.full_like(z, torch.nan) for _ in range(3)))
    inputs = RowInputs(z.clone(), noise.clone(), labels, bias, ce.to(z), kl.to(z))
    statistics = rows(inputs, LossOptions(**options), gradients)
    return statistics, gradients


def errors(statistics, gradients, expected) -> list[float]:
    return [relative_error(a, b) for a, b in zip((statistics.divergence, *gradients), expected, strict=True)]


@pytest.mark.parametrize("offset", [0, 30], ids=["centred", "offset 30 spreads"])
@pytest.mark.parametrize("peak", [0.0, 10.0, 25.0])
@pytest.mark.parametrize("spread", [1e-8, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("classes", [3, 3001])
def test_near_rows_have_value_and_gradients_to_five_in_a_million_at_every_noise(
    classes, spread, peak, offset
):
    z, noise, labels = logits(classes, spread, offset=offset * spread, peak=peak)
    expected = closed_form(z.double(), -noise.double())
    assert max(errors(*run(z, noise, labels), expected)) < 5e-6


@pytest.mark.parametrize(("spread", "bar"), [(1.0, 5e-6), (10.0, 5e-6), (60.0, 5e-5)])
@pytest.mark.parametrize("peak", [0.0, 10.0])
@pytest.mark.parametrize("classes", [3, 3001])
def test_far_rows_have_value_and_gradients(classes, peak, spread, bar):
    z, noise, labels = logits(classes, spread, peak=peak)
    z64, noised64 = z.double().requires_grad_(), (z.double() + noise.double()).requires_grad_()
    value = naive(z64, noised64)
    clean, noised = torch.autograd.grad(value.sum(), (z64, noised64))

    statistics, gradients = run(z, noise, labels)
    assert max(errors(statistics, gradients, (value.detach(), clean, noised, clean + noised))) < bar
    assert relative_error(statistics.noised_log_normalizer, noised64.detach().logsumexp(-1)) < 1e-6


def test_near_and_far_rows_of_one_block_keep_their_accuracy():
    z, noise, labels = logits(100, 1.0, peak=2.0)
    sizes = torch.tensor([1e-8, 1e-5, 1e-2, 1.0, 5.0, 20.0]).repeat(2).unsqueeze(-1)
    statistics, gradients = run(z, sizes * noise, labels)
    expected = closed_form(z.double(), -(sizes * noise).double())
    for row in range(ROWS):
        computed = (statistics.divergence[row], *(gradient[row] for gradient in gradients))
        for ours, exact in zip(computed, (value[row] for value in expected), strict=True):
            assert relative_error(ours, exact) < 1e-5  # of one row, not of all


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.1)])
@pytest.mark.parametrize("peak", [-20.0, 0.0, 20.0, 35.0, 60.0])
def test_cross_entropy_and_its_gradient_are_right_for_a_label_of_any_probability(peak, z_loss, smoothing):
    z, noise, labels = logits(300, 0.0, peak=peak)
    z64 = z.double().requires_grad_()
    expected = cross_entropy(z64, labels, smoothing=smoothing, z_loss=z_loss)
    (gradient,) = torch.autograd.grad(expected.sum(), z64)

    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    statistics, gradients = run(z, noise, labels, ce=ALL_COUNT, **options)
    assert relative_error(task_rows(statistics, LossOptions(**options)), expected) < 1e-6
    assert relative_error(gradients.clean, gradient) < 2e-6
    assert relative_error(statistics.log_normalizer, z64.detach().logsumexp(-1)) < 1e-6


def test_an_improbable_target_of_the_clean_pass_is_accurate_on_the_noised_one_too():
    z, noise, labels = logits(300, 2.0, peak=30.0)
    noised64 = (z.double() + noise.double()).requires_grad_()
    both = (cross_entropy(z.double(), labels) + cross_entropy(noised64, labels)) / 2
    (gradient,) = torch.autograd.grad(both.sum(), noised64)

    statistics, gradients = run(z, noise, labels, ce=ALL_COUNT, kl=NONE_COUNT, ce_on_noised=True)
    assert relative_error(statistics.cross_entropy, both) < 5e-6
    assert relative_error(gradients.noised, gradient) < 5e-6


@pytest.mark.parametrize(("spread", "bar"), [(1e-8, 5e-6), (1e-4, 5e-6), (1.0, 5e-6), (30.0, 5e-5)])
def test_divergence_is_never_negative_and_gradients_of_a_row_sum_to_zero(spread, bar):
    z, noise, labels = logits(500, spread, peak=5.0)
    statistics, gradients = run(z, noise, labels)
    assert (statistics.divergence >= 0).all()
    for gradient in gradients[:2]:
        assert (gradient.double().sum(-1).abs() < bar * gradient.double().abs().sum(-1)).all()
    assert (run(z, torch.full_like(z, spread), labels)[0].divergence >= 0).all()  # nothing but rounding


@pytest.mark.parametrize("classes", [1, 2, 17])
def test_equal_rows_give_exactly_zero(classes):
    z, _, labels = logits(classes, 0.0)
    statistics, gradients = run(z, torch.zeros_like(z), labels)
    for tensor in (statistics.divergence, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_one_class_leaves_nothing_to_learn():
    z, noise, labels = logits(1, 1.0)
    statistics, gradients = run(z, noise, labels, ce=ALL_COUNT)
    for tensor in (statistics.cross_entropy, statistics.divergence, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("spread", [1e-6, 1e-2, 3.0])
def test_swapping_the_rows_swaps_the_gradients(spread):
    z, noise, labels = logits(200, spread)
    z, noise = z.double(), noise.double()
    statistics, gradients = run(z, noise, labels)
    swapped, swapped_gradients = run(z + noise, -noise, labels)
    torch.testing.assert_close(swapped.divergence, statistics.divergence, rtol=1e-8, atol=0)
    torch.testing.assert_close(swapped_gradients.clean, gradients.noised, rtol=1e-6, atol=1e-15)


def test_a_shift_of_either_row_changes_nothing():
    z, noise, labels = logits(200, 1e-3, dtype=torch.float64)
    statistics, gradients = run(z, noise, labels)
    shifted, shifted_gradients = run(z + 7.0, noise + 0.5, labels)
    torch.testing.assert_close(shifted.divergence, statistics.divergence, rtol=1e-9, atol=0)
    torch.testing.assert_close(shifted_gradients.total, gradients.total, rtol=1e-6, atol=1e-18)


def test_entries_absent_from_both_rows_count_nothing():
    z, noise, labels = logits(40, 1e-3)
    labels = labels % 30
    bias = torch.zeros(40)
    bias[30:] = -torch.inf
    statistics, gradients = run(z, noise, labels, ce=ALL_COUNT, bias=bias)
    without, gradients_without = run(z[:, :30], noise[:, :30], labels, ce=ALL_COUNT)
    for padded, plain in zip(statistics, without, strict=True):
        torch.testing.assert_close(padded, plain)
    for padded, plain in zip(gradients, gradients_without, strict=True):
        torch.testing.assert_close(padded[:, :30], plain)
        assert not padded[:, 30:].any()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("spread", [1e-3, 5.0])
def test_rows_that_count_for_nothing_are_zero_whatever_is_in_them(spread, softcap):
    z, noise, labels = logits(50, spread)
    counted = torch.arange(ROWS) % 3 > 0
    z[~counted], noise[~counted] = torch.nan, torch.inf
    labels[~counted] = torch.tensor([-100, -1, 50, 10**6])
    weight = counted.float()
    statistics, gradients = run(z, noise, labels, ce=weight, kl=weight, softcap=softcap)
    for tensor in (*statistics, *gradients):
        assert not tensor[~counted].any()
        assert torch.isfinite(tensor).all()
        assert tensor[counted].any()


def test_rows_of_the_divergence_alone_have_no_cross_entropy():
    z, noise, labels = logits(50, 1e-3)
    statistics, gradients = run(z, noise, torch.full_like(labels, -100))
    assert not statistics.cross_entropy.any()
    expected = closed_form(z.double(), -noise.double())
    assert relative_error(gradients.clean, expected.clean) < 5e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("spread", [1e-3, 5.0])
def test_rows_of_the_divergence_alone_may_lack_any_class(spread, smoothing):
    z, noise, labels = logits(50, spread)
    bias = torch.zeros(50).index_fill(0, torch.tensor([0, 9]), -torch.inf)
    statistics, gradients = run(z, noise, torch.zeros_like(labels), bias=bias, label_smoothing=smoothing)
    for tensor in (*statistics, *gradients):
        assert torch.isfinite(tensor).all()
    assert not statistics.cross_entropy.any()


@pytest.mark.parametrize("spread", [1e-3, 3.0])
@pytest.mark.parametrize("detach", ["none", "clean", "noised", "target"])
def test_detach_holds_constant_what_it_names(detach, spread):
    z, noise, labels = logits(60, spread, dtype=torch.float64)
    z64, noised64 = z.clone().requires_grad_(), (z + noise).requires_grad_()
    if detach == "target":
        p, q = z64.softmax(-1), noised64.softmax(-1)
        kl = (p.detach() * (p.detach().log() - noised64.log_softmax(-1))).sum()
        divergence = kl + (q.detach() * (q.detach().log() - z64.log_softmax(-1))).sum()
    else:
        divergence = naive(
            z64.detach() if detach == "clean" else z64,
            noised64.detach() if detach == "noised" else noised64,
        ).sum()
    total = divergence + cross_entropy(z64, labels).sum()
    clean, noised = torch.autograd.grad(total, (z64, noised64), materialize_grads=True, allow_unused=True)

    _, gradients = run(z, noise, labels, ce=ALL_COUNT, detach=detach)
    for ours, exact in zip(gradients, (clean, noised, clean + noised), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("detach", ["none", "noised"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_that_fill_several_blocks_are_those_of_one(monkeypatch, softcap, detach):
    z, noise, labels = logits(60, 1.0)
    noise[::2] *= 1e-3
    weights = {"ce": torch.arange(ROWS) % 3, "kl": torch.arange(ROWS) % 4}
    options = {**weights, "bias": torch.linspace(-1, 1, 60), "softcap": softcap, "detach": detach}
    whole = run(z, noise, labels, **options)
    monkeypatch.setattr(row_module, "_CPU_BLOCK_ELEMENTS", 5 * 60)  # blocks of 5, 5 and 2 rows
    for in_blocks, in_one in zip(run(z, noise, labels, **options), whole, strict=True):
        for ours, theirs in zip(in_blocks, in_one, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_gradients_written_over_the_logits_are_those_written_beside_them():
    for detach in ("none", "clean", "noised", "target"):
        for spread in (1e-3, 3.0):
            z, noise, labels = logits(60, spread)
            _, beside = run(z, noise, labels, ce=ALL_COUNT, detach=detach)
            inside = RowGradients(torch.empty_like(z), noise, z)
            inputs = RowInputs(z, noise, labels, None, ALL_COUNT, ALL_COUNT)
            rows(inputs, LossOptions(detach=detach), inside)
            for a, b in zip(inside, beside, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0])
def test_softcapped_differences_keep_their_digits(spread):
    z, noise, labels = logits(100, spread)
    options = LossOptions(softcap=6.0, logit_scale=0.7)
    exact = expected(RowInputs(z, noise, labels, None, NONE_COUNT, ALL_COUNT), options)
    found = run(z, noise, labels, softcap=6.0, logit_scale=0.7)
    assert max(errors(*found, (exact.statistics["divergence"], *exact.gradients.values()))) < 5e-6


@pytest.mark.parametrize("ce_on_noised", [False, True])
@pytest.mark.parametrize("detach", ["none", "clean", "noised", "target"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("spread", [1e-7, 0.5, 5.0])
def test_every_option_together_is_what_autograd_makes_of_the_formulas(spread, softcap, detach, ce_on_noised):
    z, noise, labels = logits(31, spread, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 31, dtype=torch.float64)
    options = LossOptions(0.1, 1e-2, detach, ce_on_noised, logit_scale=0.5, softcap=softcap)
    exact = expected(RowInputs(z, noise, labels, bias, ALL_COUNT, ALL_COUNT), options)
    statistics, gradients = run(z, noise, labels, ce=ALL_COUNT, bias=bias, **vars(options))
    assert (
        max(errors(statistics, gradients, (exact.statistics["divergence"], *exact.gradients.values()))) < 1e-8
    )


@pytest.mark.parametrize("detach", ["none", "clean", "noised", "target"])
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4, 0.3])
def test_the_path_of_accelerators_that_branches_on_no_number_is_as_accurate(monkeypatch, spread, detach):
    z, noise, labels = logits(500, spread, peak=5.0)
    options = {"ce": ALL_COUNT, "detach": detach}
    double, exact = run(z.double(), noise.double(), labels, **options)
    monkeypatch.setattr(row_module, "_may_branch", lambda device: False)
    assert max(errors(*run(z, noise, labels, **options), (double.divergence, *exact))) < 5e-6
    assert max(errors(*run(z, noise, labels), closed_form(z.double(), -noise.double()))) < 5e-6
