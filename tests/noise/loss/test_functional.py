from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swaft.errors import ConfigError
from swaft.functional import cross_entropy_symmetric_kl, symmetric_kl

pytestmark = pytest.mark.unit


def inputs(*, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
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


def test_sum_reduction_is_the_mean_times_the_counted_rows():
    logits, noised_logits, labels = inputs()
    mean = cross_entropy_symmetric_kl(logits, noised_logits, labels)
    total = cross_entropy_symmetric_kl(logits, noised_logits, labels, reduction="sum")
    for a, b in zip(mean, total, strict=True):
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

    assert [term.item() for term in result] == [0.0, 0.0, 0.0]
    for tensor in (logits, noised_logits):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_loss_passes_gradcheck_in_float64():
    logits, noised_logits, labels = inputs()
    assert torch.autograd.gradcheck(
        lambda z, noised_z: cross_entropy_symmetric_kl(z, noised_z, labels, label_smoothing=0.1).loss,
        (logits, noised_logits),
    )


def test_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match="expected mean or sum"):
        cross_entropy_symmetric_kl(*inputs(), reduction="none")  # type: ignore[arg-type]
