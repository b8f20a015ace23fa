from __future__ import annotations

import pytest
import torch

from swaft.errors import ConfigError, NoiseError
from swaft.functional import cross_entropy_symmetric_kl, symmetric_kl

pytestmark = pytest.mark.unit


def pair(
    classes: int, spread: float, *, offset: float = 0.0, rows: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and noised fp32 logits, the clean ones peaked, whose difference has the spread asked for."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(rows, classes, generator=generator)
    logits[:, 0] += 10 if classes > 100 else 0
    noise = torch.randn(rows, classes, generator=generator).clamp(-1, 1)
    return logits, logits + spread * noise + offset


def value_and_gradients(divergence, logits, noised_logits) -> tuple[torch.Tensor, ...]:
    logits, noised_logits = (tensor.clone().requires_grad_() for tensor in (logits, noised_logits))
    rows = divergence(logits, noised_logits)
    return (rows.detach(), *torch.autograd.grad(rows.sum(), (logits, noised_logits)))


def product_form(logits: torch.Tensor, noised_logits: torch.Tensor) -> torch.Tensor:
    difference = logits.softmax(-1) - noised_logits.softmax(-1)
    return (difference * (logits.log_softmax(-1) - noised_logits.log_softmax(-1))).sum(-1)


def relative_errors(computed, exact) -> list[float]:
    return [float((a.double() - b).norm() / b.double().norm()) for a, b in zip(computed, exact, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 0.25])
@pytest.mark.parametrize("spread", [1e-2, 1.0, 10.0, 48.0])
@pytest.mark.parametrize("classes", [2, 100, 32128])
def test_fp32_value_and_gradients_agree_with_float64_to_one_in_a_million(classes, spread, offset):
    logits, noised_logits = pair(classes, spread, offset=offset * spread)

    computed = value_and_gradients(symmetric_kl, logits, noised_logits)
    exact = value_and_gradients(product_form, logits.double(), noised_logits.double())

    assert computed[0].dtype == torch.float32
    assert max(relative_errors(computed, exact)) < 1e-6


@pytest.mark.parametrize("offset", [0.0, 0.75])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 35.0, 60.0])
@pytest.mark.parametrize("classes", [3, 100])
def test_each_row_is_as_near_to_float64_as_its_largest_difference_allows(classes, spread, offset):
    logits, noised_logits = pair(classes, spread, offset=offset * spread, rows=1000)
    largest = (logits - noised_logits).abs().amax(-1).double()

    value, *gradients = value_and_gradients(symmetric_kl, logits, noised_logits)
    exact, *exact_gradients = value_and_gradients(product_form, logits.double(), noised_logits.double())

    assert ((value - exact).abs() / largest**2).max() < 3e-7
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert ((gradient - exact_gradient).norm(dim=-1) / largest).max() < 4e-7
        assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 2e-6


def test_the_plain_product_form_would_miss_that_bar():
    logits, noised_logits = pair(100, 1e-2)

    computed = value_and_gradients(product_form, logits, noised_logits)
    exact = value_and_gradients(product_form, logits.double(), noised_logits.double())

    assert max(relative_errors(computed, exact)) > 3e-6


@pytest.mark.parametrize("classes", [1, 2, 50])
def test_equal_logits_give_exactly_zero_and_zero_gradients(classes):
    logits, _ = pair(classes, 0.0)
    for tensor in value_and_gradients(symmetric_kl, logits, logits):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("spread", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_divergence_is_never_negative(spread):
    for seed in range(20):
        assert (symmetric_kl(*pair(40, spread, seed=seed, rows=32)) >= 0).all()


@pytest.mark.parametrize("peak", [0.0, 25.0, 60.0])
def test_differences_up_to_sixty_give_finite_values_and_gradients(peak):
    logits, noised_logits = pair(30, 60.0)
    logits[:, 1] += peak
    for tensor in value_and_gradients(symmetric_kl, logits, noised_logits):
        assert torch.isfinite(tensor).all()


def test_divergence_is_symmetric_in_its_arguments():
    logits, noised_logits = pair(30, 0.5)
    there, back = symmetric_kl(logits, noised_logits), symmetric_kl(noised_logits, logits)
    torch.testing.assert_close(there, back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spread", [1e-2, 3.0])
def test_classes_absent_from_both_rows_count_as_weight_zero(spread):
    logits, noised_logits = pair(20, spread)
    padding = torch.full((logits.shape[0], 5), -torch.inf)

    padded = value_and_gradients(
        symmetric_kl, torch.cat([logits, padding], 1), torch.cat([noised_logits, padding], 1)
    )
    plain = value_and_gradients(symmetric_kl, logits, noised_logits)

    real = (padded[0], *(gradient[:, :20] for gradient in padded[1:]))
    assert max(relative_errors(real, plain)) < 1e-6
    assert not any(gradient[:, 20:].any() for gradient in padded[1:])


def test_a_class_absent_from_one_row_alone_is_infinitely_far_away():
    logits, noised_logits = pair(5, 0.1, rows=2)
    logits[0, 2] = noised_logits[1, 3] = -torch.inf
    assert symmetric_kl(logits, noised_logits).tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize("spread", [1e-3, 0.3, 4.0])
def test_gradients_pass_gradcheck_in_float64(spread):
    logits, noised_logits = (tensor.double().requires_grad_() for tensor in pair(6, spread, rows=3))
    assert torch.autograd.gradcheck(symmetric_kl, (logits, noised_logits), atol=1e-7)


@pytest.mark.parametrize("spread", [1e-2, 2.0])
@pytest.mark.parametrize("detach", ["clean", "noised", "target"])
def test_detach_holds_constant_what_its_name_says(detach, spread):
    def with_autograd(z, noised_z):
        log_p, log_q = z.log_softmax(-1), noised_z.log_softmax(-1)
        if detach == "target":
            forward = (log_p.exp() * (log_p - log_q)).detach() - log_p.exp().detach() * log_q
            return forward - log_q.exp().detach() * log_p
        log_p = log_p.detach() if detach == "clean" else log_p
        log_q = log_q.detach() if detach == "noised" else log_q
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)

    logits, noised_logits = (tensor.double().requires_grad_() for tensor in pair(7, spread))
    ours = torch.autograd.grad(
        symmetric_kl(logits, noised_logits, detach=detach).sum(), (logits, noised_logits)
    )
    oracle = torch.autograd.grad(
        with_autograd(logits, noised_logits).sum(), (logits, noised_logits), materialize_grads=True
    )
    for computed, exact in zip(ours, oracle, strict=True):
        torch.testing.assert_close(computed, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("detach", ["none", "clean", "noised", "target"])
def test_a_second_derivative_is_refused_not_answered_without_the_divergence(detach):
    logits, noised_logits = (tensor.requires_grad_() for tensor in pair(7, 0.5))
    labels = torch.arange(8) % 7
    for loss in (
        symmetric_kl(logits, noised_logits, detach=detach).sum(),
        cross_entropy_symmetric_kl(logits, noised_logits, labels, detach=detach).loss,
    ):
        gradients = torch.autograd.grad(loss, (logits, noised_logits), create_graph=True)
        with pytest.raises(NoiseError, match=r"differentiated twice.*needs a loss of its own"):
            sum(gradient.square().sum() for gradient in gradients).backward()


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    logits, noised_logits = (tensor.requires_grad_() for tensor in pair(7, 0.5))
    divergence = symmetric_kl(logits, noised_logits).sum()
    first = torch.autograd.grad(divergence, (logits, noised_logits), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(divergence, (logits, noised_logits)), strict=True):
        assert torch.equal(a, b)


def test_sixteen_bit_logits_are_upcast_and_get_their_gradient_in_their_own_type():
    logits, noised_logits = (tensor.bfloat16().requires_grad_() for tensor in pair(9, 0.5))
    rows = symmetric_kl(logits, noised_logits)
    rows.sum().backward()

    assert rows.dtype == torch.float32
    assert torch.equal(rows, symmetric_kl(logits.float(), noised_logits.float()))
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_all_leading_dimensions_are_rows():
    logits, noised_logits = pair(5, 0.1, rows=6)
    rows = symmetric_kl(logits.view(2, 3, 5), noised_logits.view(2, 3, 5))
    assert torch.equal(rows, symmetric_kl(logits, noised_logits).view(2, 3))


def test_unknown_detach_is_refused_with_the_allowed_names():
    with pytest.raises(ConfigError, match=r"detach is 'both'.*none, clean, noised, target"):
        symmetric_kl(torch.zeros(1, 2), torch.zeros(1, 2), detach="both")  # type: ignore[arg-type]
