from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import cross_entropy, relative_error

from swaft.functional import (
    cross_entropy_symmetric_kl,
    linear_cross_entropy_symmetric_kl,
    symmetric_kl,
)

pytestmark = pytest.mark.unit


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    noised_logits = logits + 0.3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    return logits.requires_grad_(), noised_logits.requires_grad_(), labels


def test_loss_is_cross_entropy_plus_weighted_divergence_over_counted_rows():
    logits, noised_logits, labels = inputs()
    result = cross_entropy_symmetric_kl(
        logits, noised_logits, labels, divergence_weight=0.7, label_smoothing=0.1
    )
    counted = labels != -100

    torch.testing.assert_close(
        result.task_loss, F.cross_entropy(logits[counted], labels[counted], label_smoothing=0.1)
    )
    torch.testing.assert_close(
        result.divergence, symmetric_kl(logits[counted], noised_logits[counted]).mean()
    )
    torch.testing.assert_close(result.loss, result.task_loss + 0.7 * result.divergence)


def test_logits_and_hidden_states_without_leading_dimensions_are_one_row():
    logits, noised_logits, labels = inputs()
    hidden, noised_hidden = logits[1, 0, :3], noised_logits[1, 0, :3]
    for loss, operands in (
        (cross_entropy_symmetric_kl, (logits[1, 0], noised_logits[1, 0])),
        (linear_cross_entropy_symmetric_kl, (hidden, noised_hidden, logits[0, :, :3])),
    ):
        rows = (each.unsqueeze(0) for each in operands[:2])
        expected = loss(*rows, *operands[2:], labels[1, :1] % 5)
        result = loss(*operands, labels[1, 0] % 5)
        assert result.row_divergence.shape == ()
        assert torch.equal(result.loss, expected.loss)


def test_sum_reduction_is_the_mean_times_the_counted_rows():
    logits, noised_logits, labels = inputs()
    mean = cross_entropy_symmetric_kl(logits, noised_logits, labels)
    total = cross_entropy_symmetric_kl(logits, noised_logits, labels, reduction="sum")
    for a, b in zip(mean[:3], total[:3], strict=True):
        torch.testing.assert_close(8 * a, b)


def test_cross_entropy_of_both_passes_is_their_average():
    logits, noised_logits, labels = inputs()
    result = cross_entropy_symmetric_kl(logits, noised_logits, labels, ce_on_noised=True)
    both = [F.cross_entropy(z.flatten(0, 1), labels.flatten()) for z in (logits, noised_logits)]
    torch.testing.assert_close(result.task_loss, (both[0] + both[1]) / 2)


def test_ignored_rows_have_zero_gradients():
    logits, noised_logits, labels = inputs()
    cross_entropy_symmetric_kl(logits, noised_logits, labels).loss.backward()
    for tensor in (logits, noised_logits):
        assert tensor.grad is not None
        assert not tensor.grad[0, 3:].any()
        assert tensor.grad[1].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_a_counted_row_gives_zero_with_zero_gradients(reduction):
    logits, noised_logits, labels = inputs()
    result = cross_entropy_symmetric_kl(
        logits, noised_logits, torch.full_like(labels, -100), reduction=reduction, label_smoothing=0.1
    )
    result.loss.backward()

    assert not any(term.any() for term in result)
    for tensor in (logits, noised_logits):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_loss_passes_gradcheck_in_float64():
    logits, noised_logits, labels = inputs()
    assert torch.autograd.gradcheck(
        lambda z, noised_z: cross_entropy_symmetric_kl(z, noised_z, labels, label_smoothing=0.1).loss,
        (logits, noised_logits),
    )


def test_rows_add_up_to_the_terms():
    logits, noised_logits, labels = inputs()
    result = cross_entropy_symmetric_kl(logits, noised_logits, labels, z_loss=0.1)
    counted = labels != -100

    for rows in result[3:]:
        assert rows.shape == labels.shape
        assert not rows.requires_grad
        assert not rows[~counted].any()
    normalizer = logits.logsumexp(-1).masked_fill(~counted, 0.0)
    torch.testing.assert_close(result.row_log_normalizer, normalizer)
    task = result.row_cross_entropy + 0.1 * result.row_log_normalizer.square()
    torch.testing.assert_close(result.task_loss, task.sum() / counted.sum())
    torch.testing.assert_close(result.divergence, result.row_divergence.sum() / counted.sum())


def test_z_loss_and_token_weights_enter_as_written():
    logits, noised_logits, labels = inputs()
    token_weight = torch.arange(10.0).reshape(2, 5)
    result = cross_entropy_symmetric_kl(
        logits, noised_logits, labels, z_loss=0.1, token_weight=token_weight, ce_on_noised=True
    )
    counted = labels != -100
    weight = token_weight[counted]
    tasks = [
        F.cross_entropy(z[counted], labels[counted], reduction="none") + 0.1 * z[counted].logsumexp(-1) ** 2
        for z in (logits, noised_logits)
    ]
    torch.testing.assert_close(result.task_loss, (weight * (tasks[0] + tasks[1]) / 2).sum() / weight.sum())


def test_ignored_rows_may_hold_anything():
    logits, noised_logits, labels = (tensor.detach().clone() for tensor in inputs())
    logits[0, 3:], noised_logits[0, 3:] = torch.nan, torch.inf
    logits.requires_grad_()
    result = cross_entropy_symmetric_kl(logits, noised_logits, labels)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("peak", [10.0, 25.0, 30.0, 60.0])
def test_cross_entropy_keeps_its_digits_as_the_label_becomes_certain(peak):
    logits, noised_logits, labels = (tensor.detach() for tensor in inputs())
    labels = labels.clamp(min=0)
    logits = (
        logits.float().scatter_add(-1, labels.unsqueeze(-1), torch.full((2, 5, 1), peak)).requires_grad_()
    )
    exact_logits = logits.detach().double().requires_grad_()
    exact = cross_entropy(exact_logits, labels).mean()

    result = cross_entropy_symmetric_kl(logits, noised_logits.float(), labels, divergence_weight=0.0)
    gradients = torch.autograd.grad(result.loss, logits) + torch.autograd.grad(exact, exact_logits)
    assert relative_error(result.task_loss, exact) < 1e-6
    assert relative_error(*gradients) < 2e-6


def test_absent_classes_count_nothing():
    logits, noised_logits, labels = (tensor.detach() for tensor in inputs())
    absent = torch.full((2, 5, 3), -torch.inf, dtype=torch.float64)
    padded = [torch.cat((z, absent), -1).requires_grad_() for z in (logits, noised_logits)]
    result = cross_entropy_symmetric_kl(*padded, labels)
    torch.testing.assert_close(result.loss, cross_entropy_symmetric_kl(logits, noised_logits, labels).loss)
    for gradient in torch.autograd.grad(result.loss, padded):
        assert torch.isfinite(gradient).all()
        assert not gradient[..., 7:].any()


def test_one_class_costs_nothing():
    z = torch.randn(4, 1, requires_grad=True)
    result = cross_entropy_symmetric_kl(z, 2 * z, torch.zeros(4, dtype=torch.long))
    (gradient,) = torch.autograd.grad(result.loss, z)
    assert result.loss == 0
    assert not gradient.any()
