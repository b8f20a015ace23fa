"""The fused loss with the types and chunks of a CUDA device, computed on the CPU."""

from __future__ import annotations

import pytest
import torch
from loss_oracle import Head, head, head_divergence, leaves, relative_error, worst

from swaft import environment
from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise.loss import linear
from swaft.noise.loss.linear import row_kernel
from swaft.noise.loss.rows import rows as torch_rows

pytestmark = pytest.mark.unit


def fp16_divergence(inputs: Head) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """J alone, and what it is differentiated with respect to: its gradients ask for a loss scale."""
    states = leaves(*inputs[:3])
    result = linear_cross_entropy_symmetric_kl(
        *states,
        torch.full_like(inputs.labels, -100),
        kl_mask=torch.ones_like(inputs.labels, dtype=torch.bool),
        hidden_difference=inputs.hidden_difference,
    )
    return result.loss, states


@pytest.mark.parametrize("noise", [1e-8, 1e-4, 0.1])
def test_fp16_states_have_a_finite_accurate_loss_and_gradients_that_a_loss_scale_saves(noise):
    inputs = head(noise=noise, dtype=torch.float16)
    loss, states = fp16_divergence(inputs)
    exact = head_divergence(inputs)
    assert relative_error(loss, exact.value) < 5e-6
    scale = 1.0 / float(exact.noised_hidden.abs().max())
    gradients = torch.autograd.grad(scale * loss, states)
    assert {gradient.dtype for gradient in gradients} == {torch.float16}
    assert relative_error(gradients[1], scale * exact.noised_hidden) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cpu_computes_rows_in_torch(dtype):
    assert row_kernel(torch.device("cpu"), dtype) is torch_rows


def test_cuda_computes_rows_in_torch_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(linear, "has_triton", lambda: False)
    assert row_kernel(torch.device("cuda"), torch.float32) is torch_rows


def test_triton_is_passed_over_with_a_warning_where_it_cannot_compile(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(environment, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level("WARNING"):
        assert not environment.has_triton.__wrapped__()
    assert "Triton needs a C compiler" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(environment, "find_spec", lambda name: name)
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    with caplog.at_level("WARNING"):
        assert not environment.has_triton.__wrapped__()
    assert "Triton needs Python's headers" in caplog.text


def test_cuda_computes_float64_rows_in_torch():
    assert row_kernel(torch.device("cuda"), torch.float64) is torch_rows


def as_on_cuda(monkeypatch, dtype: torch.dtype, product_rows: int) -> None:
    """Compute with the types and chunks of CUDA, its products with wide results made of wide ones."""
    monkeypatch.setattr(linear, "_PRODUCT_ROWS", product_rows)
    monkeypatch.setattr(linear, "has_triton", lambda: False)
    arithmetic = linear._Arithmetic.of(torch.device("cuda"), dtype)
    monkeypatch.setattr(linear._Arithmetic, "of", lambda *_: arithmetic)
    monkeypatch.setattr(linear._Arithmetic, "in_place", False)

    def product(_, a, b, *, out):
        assert {a.dtype, b.dtype} <= {arithmetic.given, arithmetic.gradient}
        assert a.dtype == b.dtype
        return out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def add_product_(_, total, a, b, *, first):
        assert a.dtype == b.dtype == arithmetic.gradient
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)

    monkeypatch.setattr(linear._Arithmetic, "product", product)
    monkeypatch.setattr(linear._Arithmetic, "add_product_", add_product_)


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("detach", ["none", "noised"])
@pytest.mark.parametrize("num_counted", [None, 299])
def test_few_rows_multiplied_at_a_time_give_what_all_do(monkeypatch, num_counted, detach, form):
    inputs = head(noise=0.1, rows=300, classes=33)
    inputs.labels[7] = -100
    states = leaves(*inputs[:3], torch.zeros(33))
    options = {"form": form, "detach": detach, "num_counted": num_counted}
    whole = linear_cross_entropy_symmetric_kl(*states[:3], inputs.labels, states[3], **options)
    expected = torch.autograd.grad(whole.loss, states)
    as_on_cuda(monkeypatch, torch.float32, product_rows=48)
    both, gradients = 2 * 4 * 33, (3 if detach == "none" else 1) * 4 * 33
    few = linear_cross_entropy_symmetric_kl(
        *states[:3], inputs.labels, states[3], chunk_bytes=48 * both + 150 * gradients, **options
    )
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(few, whole, strict=True))
    assert worst(torch.autograd.grad(few.loss, states), expected) < 1e-6


def test_an_accelerator_multiplies_few_rows_at_a_time_and_keeps_the_gradients_of_many():
    weight = torch.empty(50257, 1, device="meta")
    arithmetic = linear._Arithmetic(torch.bfloat16, torch.float32, torch.bfloat16, True, torch_rows)
    memory = linear._Buffers(3, arithmetic, weight, 8192, None)
    assert (memory.product_rows, memory.rows) == (256, 5376)
    products, slab = memory.products(256), memory.slab(5376)
    taken = (products.stride(0) * 512 * 4, slab.stride(0) * 3 * 5376 * 2)
    assert products.stride() == slab.stride() == (50304, 1)  # 64 times 786
    assert sum(taken) <= linear._ACCELERATOR_CHUNK_BYTES * 1.001
    clean, *_ = memory.gradients(5376, slice(256, 512))
    assert clean.storage_offset() == 256 * 50304


@pytest.mark.parametrize("noise", [1e-8, 1e-4, 1e-2, 0.1, 1.0])
def test_fp16_as_cuda_multiplies_it_is_right_at_every_noise(monkeypatch, noise):
    as_on_cuda(monkeypatch, torch.float16, product_rows=100)
    inputs = head(noise=noise, rows=300, width=64, dtype=torch.float16)
    loss, states = fp16_divergence(inputs)
    exact = head_divergence(inputs)
    assert relative_error(loss, exact.value) < 5e-5
    scales = [1.0 / float(gradient.abs().max()) for gradient in exact[1:]]
    for scale, state, gradient in zip(scales, states, exact[1:], strict=True):
        (computed,) = torch.autograd.grad(scale * loss, state, retain_graph=True)
        assert relative_error(computed, scale * gradient) < 5e-3


def test_fp16_keeps_differences_that_are_small_beside_one_that_no_class_reads(monkeypatch):
    as_on_cuda(monkeypatch, torch.float16, product_rows=100)
    inputs = head(noise=0.01, dtype=torch.float16)
    inputs.weight[:, 0] = 0
    inputs.hidden_difference[:, 0] = 1000.0
    loss, _ = fp16_divergence(inputs)
    assert relative_error(loss, head_divergence(inputs).value) < 5e-5


def test_fp16_takes_differences_below_the_least_unit_for_none(monkeypatch):
    as_on_cuda(monkeypatch, torch.float16, product_rows=100)
    inputs = head(noise=0.0, dtype=torch.float16)
    loss, states = fp16_divergence(inputs._replace(hidden_difference=torch.full((24, 32), 1e-44)))
    assert not any(tensor.any() for tensor in (loss, *torch.autograd.grad(loss, states)))


def test_a_row_that_is_no_number_spoils_no_other_in_fp16(monkeypatch):
    as_on_cuda(monkeypatch, torch.float16, product_rows=16)
    inputs = head(noise=0.1, dtype=torch.float16)
    inputs.noised_hidden[3] = torch.nan
    inputs.labels[3] = -100
    states = leaves(*inputs[:3])
    result = linear_cross_entropy_symmetric_kl(*states, inputs.labels, num_counted=24)
    assert all(bool(t.isfinite().all()) for t in (*result, *torch.autograd.grad(result.loss, states)))
