"""Checks of the Triton kernels, for Triton's interpreter (``test_interpreted.py``) and for a GPU (``tests/gpu``).

The interpreter must be chosen before a kernel is defined, so it has a process of its own. It takes its time by the
operation, whatever its size: so few rows, wide ones. By hand:
``TRITON_INTERPRET=1 PYTHONPATH=. python tests/noise/kernels/kernel_checks.py ["sentence" ...]``
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from float64_rows import expected

from swaft.noise import generator
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowGradients, RowInputs, RowStatistics, empty_rows
from swaft.noise.loss.rows import rows as torch_rows

EXACT = 5e-6
"""Relative error of fp32 sums of terms that do not cancel, norm-wise, with room for the worst row."""
FAR = 5e-5
"""The same where logits differ by up to 60: the exponents carry the error of numbers that large."""
EVERYTHING = LossOptions(label_smoothing=0.1, z_loss=1e-2, logit_scale=0.7, softcap=5.0, ce_on_noised=True)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where the kernels run."""

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a check under its sentence."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def some_rows(
    *,
    spread: float,
    num_rows: int = 2,
    num_classes: int = 9001,
    form: str = "difference",
    offset: float = 0.0,
    peak: float = 10.0,
    peak_beside_label: bool = False,
    biased: bool = False,
) -> RowInputs:
    """Logits of standard deviation 2.5, one of them raised by ``peak``; differences of deviation ``spread``."""
    generator = torch.Generator().manual_seed(num_classes)
    raw = 2.5 * torch.randn(num_rows, num_classes, generator=generator)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    raw[torch.arange(num_rows), (labels + peak_beside_label) % num_classes] += peak
    noise = spread * (torch.randn(num_rows, num_classes, generator=generator) + offset)
    return RowInputs(
        raw,
        raw + noise if form == "direct" else noise,
        labels,
        torch.randn(num_classes, generator=generator) if biased else None,
        torch.rand(num_rows, generator=generator) + 0.5,
        torch.rand(num_rows, generator=generator) + 0.5,
    )


def run(rows: RowInputs, options: LossOptions, gradients: RowGradients | None):
    from swaft.noise.loss import rows_triton

    there = on_device(rows)
    before = there.raw.clone(), there.raw_noise.clone()
    statistics = rows_triton.rows(there, options, gradients)
    for given, kept in zip((there.raw, there.raw_noise), before, strict=True):
        assert torch.equal(given.nan_to_num(), kept.nan_to_num()), "the kernel wrote into its input"
    return RowStatistics(*(value.cpu() for value in statistics))


def on_device(rows: RowInputs) -> RowInputs:
    """The rows where the kernels run, in memory such as the kernel takes; NaN behind the last class."""
    raw, raw_noise = (buffer(rows).copy_(matrix) for matrix in (rows.raw, rows.raw_noise))
    return RowInputs(raw, raw_noise, *(None if each is None else each.to(DEVICE) for each in rows[2:]))  # type: ignore[arg-type]


def buffer(rows: RowInputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory in which an element that nobody wrote is NaN."""
    matrix = empty_rows(*rows.raw.shape, dtype=dtype, device=torch.device(DEVICE))
    assert matrix._base is not None
    matrix._base.fill_(torch.nan)
    return matrix


def poisoned(rows: RowInputs, dtype: torch.dtype = torch.float32) -> RowGradients:
    return RowGradients(*(buffer(rows, dtype) for _ in range(3)))


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """||got - wanted|| / ||wanted||; infinite for NaN."""
    distance = float(torch.linalg.vector_norm(got.cpu().double() - wanted))
    size = float(torch.linalg.vector_norm(wanted))
    if distance != distance:
        return float("inf")
    return 0.0 if distance == 0 else distance / max(size, 1e-300)


def agree(rows: RowInputs, options: LossOptions | None = None, bar: float = EXACT) -> None:
    """Statistics and all three gradients are within ``bar`` of float64."""
    options = options or LossOptions()
    gradients = poisoned(rows)
    statistics = run(rows, options, gradients)
    wanted = expected(rows, options)
    errors = {name: error(getattr(statistics, name), value) for name, value in wanted.statistics.items()}
    errors |= {name: error(getattr(gradients, name), value) for name, value in wanted.gradients.items()}
    assert all(value <= bar for value in errors.values()), errors


def divergence_alone(rows: RowInputs) -> RowInputs:
    """Without the cross entropy, whose gradient is so much larger that it would hide the divergence's."""
    return rows._replace(ce_weight=torch.zeros_like(rows.ce_weight))


@check
def value_and_gradients_are_exact_for_differences_from_1e_minus_8_to_10():
    for spread in (1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0):
        agree(divergence_alone(some_rows(spread=spread)))


@check
def value_and_gradients_hold_for_differences_of_30_and_60():
    for spread in (30.0, 60.0):
        agree(divergence_alone(some_rows(spread=spread)), bar=FAR)


@check
def the_direct_form_is_exact_for_the_logits_it_is_given():
    for spread in (0.1, 1.0, 10.0):
        agree(some_rows(spread=spread, form="direct"), LossOptions(form="direct"))


@check
def an_offset_shared_by_the_row_costs_no_digits():
    agree(divergence_alone(some_rows(spread=1e-4, offset=30.0)))


@check
def a_certain_label_costs_no_digits():
    agree(some_rows(spread=1e-4, peak=30.0))
    agree(divergence_alone(some_rows(spread=1e-4, peak=30.0)))


@check
def a_certain_class_other_than_the_label_costs_no_digits():
    agree(divergence_alone(some_rows(spread=1e-4, peak=30.0, peak_beside_label=True)))


@check
def everything_at_once_is_exact():
    for spread in (1e-5, 1e-2, 1.0, 10.0):
        agree(some_rows(spread=spread, biased=True), EVERYTHING)
    agree(some_rows(spread=1.0, form="direct", biased=True), replace(EVERYTHING, form="direct"))


@check
def a_saturated_softcap_costs_no_digits():
    options = LossOptions(softcap=1.0)
    agree(divergence_alone(some_rows(spread=1e-3)), options)


@check
def each_option_alone_is_exact():
    for options in (
        LossOptions(label_smoothing=0.1),
        LossOptions(z_loss=1e-2),
        LossOptions(logit_scale=0.044),
        LossOptions(softcap=30.0),
        LossOptions(ce_on_noised=True),
        LossOptions(ce_on_noised=True, label_smoothing=0.1, z_loss=1e-2),
    ):
        agree(some_rows(spread=0.1), options)
    agree(some_rows(spread=0.1, biased=True))


@check
def every_detached_form_has_its_own_gradients():
    for detach in ("clean", "noised", "target"):
        agree(some_rows(spread=1e-2), LossOptions(detach=detach))
        agree(divergence_alone(some_rows(spread=1e-2, biased=True)), replace(EVERYTHING, detach=detach))


@check
def classes_that_are_minus_infinity_in_both_passes_weigh_nothing():
    for form in ("difference", "direct"):
        rows = some_rows(spread=0.1, form=form)
        rows.raw[:, -5:] = -torch.inf
        rows.raw_noise[:, -5:] = -torch.inf if form == "direct" else torch.nan
        agree(rows, LossOptions(form=form))


@check
def a_bias_of_minus_infinity_takes_a_class_out():
    rows = some_rows(spread=0.1, biased=True)
    assert rows.bias is not None
    rows.bias[-5:] = -torch.inf
    agree(rows)


@check
def a_row_without_weights_is_all_zero_whatever_its_numbers():
    rows = some_rows(spread=0.1, num_rows=3)
    rows.raw[1] = torch.nan
    rows.raw_noise[1] = torch.inf
    rows.labels[1] = -100
    rows.ce_weight[1] = rows.kl_weight[1] = 0.0
    agree(rows)


@check
def a_row_may_count_for_the_divergence_alone_with_any_label():
    for label in (-100, 1 << 40):
        rows = divergence_alone(some_rows(spread=1e-4))
        rows.labels[:] = label
        agree(rows)


@check
def a_row_may_count_for_the_cross_entropy_alone():
    rows = some_rows(spread=0.1)
    agree(rows._replace(kl_weight=torch.zeros_like(rows.kl_weight)))


@check
def a_label_out_of_range_that_counts_is_not_passed_over():
    rows = some_rows(spread=0.1)
    rows.labels[1] = rows.raw.shape[1]
    cross_entropy = run(rows, LossOptions(), None).cross_entropy
    assert cross_entropy.isnan().tolist() == [False, True]


@check
def any_number_of_classes_will_do():
    for num_classes in (1, 2, 3, 1023, 4096, 4097):
        agree(some_rows(spread=0.1, num_classes=num_classes))


@check
def equal_passes_have_exactly_no_divergence():
    for form in ("difference", "direct"):
        rows = divergence_alone(some_rows(spread=0.0, form=form))
        gradients = poisoned(rows)
        assert torch.equal(run(rows, LossOptions(form=form), gradients).divergence, torch.zeros(2))
        assert all(not gradient.any() for gradient in gradients)


@check
def statistics_do_not_depend_on_whether_gradients_are_asked_for():
    rows = some_rows(spread=0.1)
    alone, beside = run(rows, LossOptions(), None), run(rows, LossOptions(), poisoned(rows))
    assert all(error(a, b.double()) < EXACT for a, b in zip(alone, beside, strict=True))


@check
def a_gradient_that_is_not_asked_for_changes_no_other():
    rows = some_rows(spread=0.1)
    whole, part = poisoned(rows), poisoned(rows)._replace(total=None)
    run(rows, LossOptions(), whole)
    run(rows, LossOptions(), part)
    assert error(part.clean, whole.clean.cpu().double()) < EXACT
    assert error(part.noised, whole.noised.cpu().double()) < EXACT


@check
def gradients_in_bf16_are_those_in_fp32_rounded():
    rows = some_rows(spread=0.1)
    exact, rounded = poisoned(rows), poisoned(rows, torch.bfloat16)
    run(rows, LossOptions(), exact)
    run(rows, LossOptions(), rounded)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert wide is not None
        assert narrow is not None
        assert error(narrow, wide.cpu().double()) < 2**-7  # Triton's interpreter truncates


@check
def rows_may_lie_further_apart_than_they_must():
    from swaft.noise.loss import rows_triton

    rows = some_rows(spread=0.1)
    classes = rows.raw.shape[1]
    matrices = empty_rows(4, 2 * classes, dtype=torch.float32, device=torch.device(DEVICE))[:, :classes]
    matrices.copy_(torch.cat([rows.raw, rows.raw_noise]))
    apart = on_device(rows)._replace(raw=matrices[:2], raw_noise=matrices[2:])
    statistics = rows_triton.rows(apart, LossOptions(), None)
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(statistics, run(rows, LossOptions(), None), strict=True)
    )


@check
def a_head_through_the_kernel_few_rows_at_a_time_is_that_of_torch():
    from swaft.noise.loss import linear, rows_triton

    generator = torch.Generator().manual_seed(0)
    count, width, classes = 7, 8, 1001

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    hidden, noise, weight = normal(count, width), 1e-2 * normal(count, width), normal(classes, width)
    labels = torch.randint(0, classes, (count,), generator=generator).to(DEVICE)
    weights, factor = torch.rand(count, generator=generator).to(DEVICE), torch.tensor(0.1, device=DEVICE)
    inputs = linear.LinearInputs(
        *(hidden, hidden - noise, noise, weight, normal(classes), labels, weights, weights, factor)
    )
    options, needs = LossOptions(label_smoothing=0.1), linear.Needs(True, True, True, True)
    outcomes = []
    for kernel in (torch_rows, rows_triton.rows):
        with (
            mock.patch.object(linear, "row_kernel", lambda *_, kernel=kernel: kernel),
            mock.patch.object(linear, "_PRODUCT_ROWS", 3),
        ):
            outcomes.append(linear.linear_loss(inputs, options, needs, operand_dtype=torch.float32))
    for ours, theirs in zip(*outcomes, strict=True):
        assert error(ours, theirs.double().cpu()) < EXACT


def drawn(numel: int, *, noise: generator.Noise, stream: int) -> torch.Tensor:
    from swaft.noise import philox_triton

    out = torch.full((numel,), torch.nan, device=DEVICE)
    nothing, sigma = torch.zeros_like(out), torch.ones((), device=DEVICE)
    philox_triton.noise_into(out, nothing, noise=noise, sigma=sigma, stream=stream)
    return out.cpu()


@check
def noise_has_the_bits_of_the_torch_form():
    for noise in ("uniform", "normal"):
        for stream in (0, 5, 0xDEADBEEF12345678, 2**64 - 1):
            wanted = generator.standard_noise(5003, noise=noise, stream=stream)
            assert torch.equal(drawn(5003, noise=noise, stream=stream), wanted), (noise, stream)


@check
def noise_is_added_in_the_type_of_the_result():
    from swaft.noise import philox_triton

    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64,) * 2,
    ):
        embedding = torch.randn(1001, generator=torch.Generator().manual_seed(1)).to(dtype)
        out = torch.empty(1001, dtype=wide, device=DEVICE)
        sigma = torch.tensor(1e-5, device=DEVICE)
        philox_triton.noise_into(out, embedding.to(DEVICE), noise="uniform", sigma=sigma, stream=7)
        noise = generator.standard_noise(1001, noise="uniform", stream=7) * 1e-5
        assert torch.equal(out.cpu(), embedding.to(wide) + noise.to(wide)), dtype


@check
def the_words_are_mapped_as_tritons_own_random_functions_map_them():
    import triton
    import triton.language as tl

    @triton.jit
    def own(out, seed, NORMAL: tl.constexpr):
        place = tl.arange(0, 256)
        if NORMAL:
            a, b, c, d = tl.randn4x(seed, place)
        else:
            a, b, c, d = tl.rand4x(seed, place)
        tl.store(out + 4 * place, a)
        tl.store(out + 4 * place + 1, b)
        tl.store(out + 4 * place + 2, c)
        tl.store(out + 4 * place + 3, d)

    uniform, normal = torch.empty(2, 1024, device=DEVICE)
    own[(1,)](uniform, 12345, False)
    own[(1,)](normal, 12345, True)
    assert torch.equal(drawn(1024, noise="uniform", stream=12345), 2 * uniform.cpu() - 1)
    torch.testing.assert_close(drawn(1024, noise="normal", stream=12345), normal.cpu(), rtol=1e-5, atol=1e-5)


def main(names: list[str]) -> None:
    # numpy's, of the interpreter: a tile computes both sides of every choice, and one of them may overflow.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    torch.set_num_threads(1)
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
