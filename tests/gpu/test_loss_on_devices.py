"""The fused loss on a CPU and on a card: shapes that do not divide, and factors that are no power of two."""

from __future__ import annotations

import pytest
import torch
from loss_oracle import Head, head, naive_head_loss, relative_error

from swaft.functional import linear_cross_entropy_symmetric_kl

ONE_CHUNK, LEAST_CHUNK = None, 1
"""Bytes of a chunk; the least is 128 rows, so that of 300 rows the last chunk has 44."""


def leaves(inputs: Head, bias: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    return [each.detach().to(device).requires_grad_() for each in (*inputs[:3], bias)]


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, LEAST_CHUNK])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize(
    ("dtype", "value_bar", "bar"), [(torch.float32, 1e-5, 5e-5), (torch.bfloat16, 2e-3, 1e-2)]
)
def test_an_odd_vocabulary_a_bias_a_softcap_and_a_partial_chunk_give_the_loss_of_float64(
    device, dtype, value_bar, bar, form, softcap, chunk_bytes
):
    inputs = head(noise=0.5, rows=300, classes=601, dtype=dtype)
    labels = inputs.labels.index_fill(0, torch.tensor([2, 3, 11, 299]), -100)
    bias = torch.linspace(-1, 1, 601).to(dtype)
    options = {"softcap": softcap, "logit_scale": 0.6, "label_smoothing": 0.1, "z_loss": 1e-2}
    exact = [each.detach().double().requires_grad_() for each in (*inputs[:3], bias)]
    expected = naive_head_loss(*exact[:3], labels, exact[3], **options)
    wanted = torch.autograd.grad(expected, exact)

    states = leaves(inputs, bias, device)
    loss = linear_cross_entropy_symmetric_kl(
        *states[:3],
        labels.to(device),
        states[3],
        form=form,
        chunk_bytes=chunk_bytes,
        num_counted=296,
        **options,
    ).loss
    assert relative_error(loss.cpu(), expected) < value_bar
    for name, gradient, right in zip(
        ("hidden", "noised", "weight", "bias"), torch.autograd.grad(loss, states), wanted, strict=True
    ):
        assert relative_error(gradient.cpu(), right) < bar, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1 / 3, 0.7, 3.0])
def test_a_loss_that_is_scaled_by_no_power_of_two_has_gradients_scaled_by_just_that(device, dtype, scale):
    """Rounding the factor to bf16 would be 0.2 % off in every element, the same way."""
    inputs = head(noise=0.1, rows=300, classes=601, dtype=dtype)
    states = leaves(inputs, torch.zeros(601, dtype=dtype), device)
    loss = linear_cross_entropy_symmetric_kl(
        *states[:3], inputs.labels.to(device), states[3], reduction="sum"
    ).loss
    plain = torch.autograd.grad(loss, states, retain_graph=True)
    scaled = torch.autograd.grad(loss * torch.tensor(scale, device=device), states)
    for once, times in zip(plain[:3], scaled[:3], strict=True):
        once, times = once.cpu().double(), times.cpu().double()
        realised = float((once * times).sum() / once.square().sum())
        assert realised == pytest.approx(scale, rel=2e-4)
