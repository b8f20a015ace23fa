"""What only a GPU shows of the fused loss: compiled kernels, 16-bit products, memory, no waiting of the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_checks
import pytest
import torch
from float64_rows import expected
from kernel_checks import error, on_device, poisoned, some_rows
from torch import Tensor

import swaft
from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise.generator import add_noise
from swaft.noise.loss import linear
from swaft.noise.loss import rows as torch_rows
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import RowGradients, RowInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

VALUE_BAR, GRADIENT_BAR = 2e-3, 5e-3
"""Relative errors of the loss in bf16, at every noise size: what rounding the operands costs, and no more."""
NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize("name", kernel_checks.CHECKS)
def test_compiled(name):
    kernel_checks.CHECKS[name]()


@pytest.mark.parametrize("spread", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("options", [LossOptions(), kernel_checks.EVERYTHING], ids=["plain", "everything"])
def test_both_row_kernels_agree_on_many_rows(options, spread):
    rows = on_device(some_rows(spread=spread, num_rows=300, num_classes=32_128, biased=True))
    statistics, gradients = both_kernels(rows, options)
    for name, (ours, theirs) in (statistics | gradients).items():
        assert error(ours, theirs.double().cpu()) < 1e-5, name


def both_kernels(rows: RowInputs, options: LossOptions) -> tuple[dict[str, tuple[Tensor, Tensor]], ...]:
    from swaft.noise.loss import rows_triton

    outcomes = []
    for kernel in (rows_triton.rows, torch_rows.rows):
        buffers = poisoned(rows)
        copies = rows._replace(raw=rows.raw.clone(), raw_noise=rows.raw_noise.clone())
        statistics = kernel(copies, options, buffers)
        outcomes.append((statistics._asdict(), buffers._asdict()))
    (ours, our_gradients), (theirs, their_gradients) = outcomes
    return (
        {name: (ours[name], theirs[name]) for name in ours},
        {name: (our_gradients[name], their_gradients[name]) for name in our_gradients},
    )


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40e9,
    reason="two such matrices and their gradients take 26 GB",
)
def test_a_row_past_two_to_the_31_elements_is_read_and_written_where_it_lies():
    from swaft.noise.loss import rows_triton

    classes = 250_112
    count = (1 << 31) // classes + 2
    raw = torch.zeros(count, classes, device="cuda")
    noise = torch.zeros_like(raw)
    last = on_device(some_rows(spread=0.1, num_rows=1, num_classes=classes))
    raw[-1], noise[-1] = last.raw[0], last.raw_noise[0]
    weights = torch.ones(count, device="cuda")
    labels = last.labels.expand(count).contiguous()
    clean = torch.full((count, classes), torch.nan, dtype=torch.bfloat16, device="cuda")
    noised = torch.full_like(clean, torch.nan)
    inputs = RowInputs(raw, noise, labels, None, weights, weights)
    many = rows_triton.rows(inputs, LossOptions(), RowGradients(clean, noised, None))
    alone_gradients = RowGradients(torch.empty_like(clean[:1]), torch.empty_like(clean[:1]), None)
    one = last._replace(ce_weight=weights[:1], kl_weight=weights[:1])
    alone = rows_triton.rows(one, LossOptions(), alone_gradients)
    assert all(error(a[-1], b[0].cpu().double()) < 1e-6 for a, b in zip(many, alone, strict=True))
    assert error(clean[-1], alone_gradients.clean[0].cpu().double()) < 1e-3
    assert error(noised[-1], alone_gradients.noised[0].cpu().double()) < 1e-3


def test_rows_come_out_the_same_every_time():
    from swaft.noise.loss import rows_triton

    rows = on_device(some_rows(spread=0.1, num_rows=300, num_classes=32_128))
    first, second = poisoned(rows), poisoned(rows)
    statistics = rows_triton.rows(rows, LossOptions(), first)
    again = rows_triton.rows(rows, LossOptions(), second)
    assert all(torch.equal(a, b) for a, b in zip(statistics, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@dataclass
class Head:
    """Operands of a head on the device, and where their gradients go."""

    hidden: Tensor
    noised_hidden: Tensor
    difference: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.noised_hidden, self.weight


def make_head(
    *, noise: float, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int, int] = (512, 256, 8192)
) -> Head:
    """Hidden states exact in ``dtype``, differences of a standard deviation of ``noise`` in the logits, in fp32."""
    count, width, classes = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda")

    hidden = normal(count, width).to(dtype)
    weight = (normal(classes, width) * 2.5 / width**0.5).to(dtype)
    difference = normal(count, width) * (noise / 2.5)
    noised = (hidden.float() - difference).to(dtype)
    labels = torch.randint(0, classes, (count,), generator=generator, device="cuda")
    return Head(hidden.requires_grad_(), noised.requires_grad_(), difference, weight.requires_grad_(), labels)


def divergence_of(head: Head, form: str = "difference") -> Tensor:
    """The divergence alone, summed: with the cross entropy its gradients would not show."""
    return linear_cross_entropy_symmetric_kl(
        head.hidden,
        head.noised_hidden,
        head.weight,
        torch.full_like(head.labels, -100),
        hidden_difference=head.difference if form == "difference" else None,
        kl_mask=torch.ones_like(head.labels, dtype=torch.bool),
        kl_normalizer=1.0,
        form=form,
    ).loss


def float64_divergence(head: Head, form: str = "difference") -> tuple[Tensor, list[Tensor]]:
    """Value and gradients in float64, by autograd over whole logits."""
    hidden, noised, weight = (leaf.detach().double() for leaf in head.leaves)
    change = -head.difference.double() if form == "difference" else noised - hidden
    zeros = torch.zeros(len(hidden), device="cuda")
    rows = RowInputs(hidden @ weight.T, change @ weight.T, head.labels, None, zeros, zeros + 1)
    wanted = expected(rows, LossOptions())
    g = wanted.gradients
    weight_gradient = g["noised"].T @ change + g["total"].T @ hidden
    gradients = [g["clean"] @ weight, g["noised"] @ weight, weight_gradient]
    return wanted.statistics["divergence"].sum(), gradients


def assert_close(head: Head, form: str, value_bar: float, gradient_bar: float, scale: float = 1.0) -> None:
    loss = divergence_of(head, form)
    value, gradients = float64_divergence(head, form)
    got = torch.autograd.grad(loss, head.leaves, torch.tensor(scale, device="cuda"))
    assert error(loss.detach(), value.cpu()) < value_bar
    for name, gradient, wanted in zip(("hidden", "noised", "weight"), got, gradients, strict=True):
        assert error(gradient.double() / scale, wanted.cpu()) < gradient_bar, name


@pytest.mark.parametrize("noise", [*NOISES, 1.0])
def test_bf16_is_right_at_every_noise_size(noise):
    assert_close(make_head(noise=noise), "difference", VALUE_BAR, GRADIENT_BAR)


@pytest.mark.parametrize("noise", [1.0, 5.0])
def test_the_direct_form_in_bf16_is_right_at_large_noise(noise):
    # Here G and G' cancel in part after they were rounded, which costs the weight a bit.
    assert_close(make_head(noise=noise), "direct", VALUE_BAR, 2 * GRADIENT_BAR)


@pytest.mark.parametrize("noise", [*NOISES, 1.0])
def test_fp32_is_right_at_every_noise_size(noise):
    assert_close(make_head(noise=noise, dtype=torch.float32), "difference", 1e-5, 5e-5)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1e-1, 1.0])
def test_fp16_under_a_loss_scale_is_right(noise):
    # The value's bar is that of tests/noise/loss/test_linear_as_on_cuda.py; by the draw its error is 1e-6 to 8e-6.
    assert_close(make_head(noise=noise, dtype=torch.float16), "difference", 5e-5, GRADIENT_BAR, scale=1024.0)


def test_the_kernels_give_one_loss(monkeypatch):
    head = make_head(noise=1e-2)
    with monkeypatch.context() as patch:
        patch.setattr(linear, "row_kernel", lambda *_: torch_rows.rows)
        by_torch = divergence_of(head)
    assert float(divergence_of(head)) == pytest.approx(float(by_torch), rel=1e-5)


def whole_loss(hidden: Tensor, noised: Tensor, weight: Tensor, difference: Tensor, labels: Tensor) -> Tensor:
    """All of the loss, with every third label ignored."""
    labels = torch.where(torch.arange(len(labels), device=labels.device) % 3 == 0, -100, labels)
    return linear_cross_entropy_symmetric_kl(
        hidden,
        noised,
        weight,
        labels,
        hidden_difference=difference,
        label_smoothing=0.1,
        num_counted=len(labels) - (len(labels) + 2) // 3,
    ).loss


def whole_loss_of(head: Head) -> Tensor:
    return whole_loss(*head.leaves, head.difference, head.labels)


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_never_waits_for_the_loss():
    head = make_head(noise=1e-2)
    torch.autograd.grad(whole_loss_of(head), head.leaves)  # compiles
    with waiting_forbidden():
        torch.autograd.grad(whole_loss_of(head), head.leaves)


def test_the_host_never_waits_for_the_noise():
    embedding = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    sigma = torch.tensor(0.1, device="cuda")
    place = {"noise": "normal", "seed": 1, "rank": 2, "step": 3}
    add_noise(embedding, sigma=0.1, **place)
    with waiting_forbidden():
        add_noise(embedding, sigma=0.1, **place)
        add_noise(embedding, sigma=sigma, **place)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_noise_has_the_bits_it_has_on_a_cpu(noise):
    place = {"noise": noise, "sigma": 1e-5, "seed": 1, "rank": 2, "step": 3}
    here, there = (add_noise(torch.zeros(1001, 999, device=d), **place) for d in ("cpu", "cuda"))
    assert torch.equal(there.cpu(), here)
    embedding = torch.randn(1001, 999).bfloat16()
    assert torch.equal(add_noise(embedding.cuda(), **place).cpu(), add_noise(embedding, **place))


def test_the_largest_vocabulary_fits_into_3_gb_beyond_inputs_and_gradients():
    head = make_head(noise=1e-3, shape=(8192, 1024, 250_112))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy_symmetric_kl(
        head.hidden, head.noised_hidden, head.weight, head.labels, hidden_difference=head.difference
    ).loss
    loss.backward()
    torch.cuda.synchronize()
    gradients = sum(leaf.nbytes for leaf in head.leaves)
    assert torch.cuda.max_memory_allocated() - before - gradients <= 3e9
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in head.leaves)


def test_autocast_rounds_the_operands_and_keeps_loss_and_gradients_wide():
    head = make_head(noise=1e-2, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss = divergence_of(head)
    got = torch.autograd.grad(loss, head.leaves)
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in got)
    rounded = [leaf.detach().bfloat16().float() for leaf in (head.hidden, head.weight)]
    value, wanted = float64_divergence(replace(head, hidden=rounded[0], weight=rounded[1]))
    assert error(loss.detach(), value.cpu()) < VALUE_BAR
    assert all(error(a, b.cpu()) < GRADIENT_BAR for a, b in zip(got, wanted, strict=True))


def test_a_compiled_function_gives_the_same_loss_and_gradients():
    head = make_head(noise=1e-2)
    compiled = torch.compile(whole_loss, fullgraph=True)
    ours, theirs = compiled(*head.leaves, head.difference, head.labels), whole_loss_of(head)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, head.leaves), torch.autograd.grad(theirs, head.leaves), strict=True
    ):
        assert error(a, b.double().cpu()) < 1e-3


REPOSITORY = str(Path(swaft.__file__).parents[1])
SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_kernels_touch_no_memory_but_theirs(tool):
    assert SANITIZER is not None
    names = [
        "any number of classes will do",
        "a row may count for the divergence alone with any label",
        "everything at once is exact",
        "noise has the bits of the torch form",
    ]
    finished = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "7", sys.executable, kernel_checks.__file__, *names],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert finished.stdout.count('"failure": null') == len(names), finished.stdout[-4000:]
