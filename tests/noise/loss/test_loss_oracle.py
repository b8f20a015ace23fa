"""The closed form that tiny differences are held to is itself held to the definition, in 60 digits."""

from __future__ import annotations

import mpmath
import pytest
import torch
from loss_oracle import naive, relative_error

from benchmarks.fused_loss_oracle import closed_form

pytestmark = pytest.mark.unit


def exact(z: list[float], difference: list[float]) -> tuple[mpmath.mpf, list, list, list]:
    """J, dJ/dz, dJ/dz' and their sum from softmaxes in 60 digits."""
    z = [mpmath.mpf(value) for value in z]
    noised = [a - mpmath.mpf(b) for a, b in zip(z, difference, strict=True)]

    def softmax(values):
        total = mpmath.fsum(mpmath.exp(value) for value in values)
        return [mpmath.exp(value) / total for value in values]

    p, q = softmax(z), softmax(noised)
    log_ratio = [mpmath.log(a / b) for a, b in zip(p, q, strict=True)]
    kl = mpmath.fsum(a * r for a, r in zip(p, log_ratio, strict=True))
    reverse = -mpmath.fsum(b * r for b, r in zip(q, log_ratio, strict=True))
    triples = list(zip(p, q, log_ratio, strict=True))
    clean = [a * (r - kl) + a - b for a, b, r in triples]
    noised_gradient = [-(b * (r + reverse) + a - b) for a, b, r in triples]
    total = [a + b for a, b in zip(clean, noised_gradient, strict=True)]
    return kl + reverse, clean, noised_gradient, total


@pytest.mark.parametrize("spread", [1e-12, 1e-8, 1e-4, 1e-1, 1.0, 8.0])
def test_closed_form_has_ten_digits_at_every_size_of_the_difference(spread):
    generator = torch.Generator().manual_seed(0)
    z = 2.5 * torch.randn(7, generator=generator, dtype=torch.float64)
    difference = spread * torch.randn(7, generator=generator, dtype=torch.float64)

    with mpmath.workdps(60):
        expected = exact(z.tolist(), difference.tolist())
    for ours, theirs in zip(closed_form(z, difference), expected, strict=True):
        theirs = [theirs] if isinstance(theirs, mpmath.mpf) else theirs
        expected_tensor = torch.tensor([float(value) for value in theirs], dtype=torch.float64)
        assert relative_error(ours.reshape(-1), expected_tensor) < 1e-10


def test_closed_form_is_the_gradient_that_autograd_takes_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    noised_z = (
        (z + 0.3 * torch.randn(5, 40, generator=generator, dtype=torch.float64)).detach().requires_grad_()
    )

    value = naive(z, noised_z)
    clean, noised = torch.autograd.grad(value.sum(), (z, noised_z))
    ours = closed_form(z.detach(), (z - noised_z).detach())
    for a, b in zip(ours, (value, clean, noised, clean + noised), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-13)
