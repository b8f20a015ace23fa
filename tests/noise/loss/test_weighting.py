from __future__ import annotations

import pytest
import torch

from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.weighting import row_weights

pytestmark = pytest.mark.unit

LABELS = torch.tensor([[3, 0, -100], [1, -100, -100]])


def weigh(labels=LABELS, **options):
    dtype = options.pop("dtype", torch.float64)
    return row_weights(labels, LossOptions(**options), num_classes=7, dtype=dtype)


def test_rows_count_where_the_label_is_not_ignored():
    weights = weigh()
    assert weights.cross_entropy.tolist() == weights.divergence.tolist() == [1, 1, 0, 1, 0, 0]
    assert weights.labels.tolist() == [3, 0, 0, 1, 0, 0]
    assert weights.task_normalizer == weights.divergence_normalizer == 3


def test_token_weights_enter_both_sums_and_both_means():
    token_weight = torch.tensor([[0.5, 2.0, 7.0], [1.0, 7.0, 7.0]])
    weights = weigh(token_weight=token_weight)
    assert weights.divergence.tolist() == [0.5, 2, 0, 1, 0, 0]
    assert weights.task_normalizer == weights.divergence_normalizer == 3.5


def test_token_weights_of_rows_of_the_divergence_alone_count_too():
    token_weight = torch.tensor([[0.5, 2.0, 7.0], [1.0, 4.0, torch.nan]])
    weights = weigh(
        token_weight=token_weight, kl_mask=torch.tensor([[False, True, True], [True, True, False]])
    )
    assert weights.cross_entropy.tolist() == [0.5, 2, 0, 1, 0, 0]
    assert weights.divergence.tolist() == [0, 2, 7, 1, 4, 0]
    assert (weights.task_normalizer, weights.divergence_normalizer) == (3.5, 14)


def test_reduction_sum_divides_by_nothing_but_the_divergence_by_a_number_that_is_given():
    weights = weigh(reduction="sum")
    assert weights.task_normalizer == weights.divergence_normalizer == 1
    weights = weigh(reduction="sum", kl_normalizer=5)
    assert (weights.task_normalizer, weights.divergence_normalizer) == (1, 5)


def test_fairseq_sums_over_padding_and_divides_by_sentences():
    weights = weigh(kl_mask=torch.ones_like(LABELS, dtype=torch.bool), kl_normalizer=2)
    rows = torch.arange(1.0, 7.0, dtype=torch.float64)
    task_loss, divergence = weights.reduce(rows, rows)
    assert float(task_loss) == pytest.approx((1 + 2 + 4) / 3)
    assert float(divergence) == pytest.approx(21 / 2)


def test_parlai_sums_over_padding_and_divides_by_counted_tokens():
    weights = weigh(kl_mask=torch.ones_like(LABELS, dtype=torch.bool), kl_normalizer=torch.tensor(3))
    rows = torch.arange(1.0, 7.0, dtype=torch.float64)
    assert float(weights.reduce(rows, rows)[1]) == pytest.approx(21 / 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"kl_mask": torch.ones_like(LABELS, dtype=torch.bool), "kl_normalizer": 2},
        {"token_weight": torch.tensor([[0.5, 2.0, 7.0], [1.0, 7.0, 7.0]]), "kl_normalizer": 5.0},
        {"labels": torch.full_like(LABELS, -100), "kl_mask": LABELS == -100},
        {"labels": torch.full_like(LABELS, -100)},
    ],
)
def test_one_weighted_sum_and_one_factor_give_the_whole_loss(options):
    weights = weigh(**options)
    generator = torch.Generator().manual_seed(0)
    task, divergence = torch.rand(2, 6, generator=generator, dtype=torch.float64)

    ce, kl, factor = weights.in_loss(0.7)
    task_loss, mean_divergence = weights.reduce(task, divergence)

    torch.testing.assert_close(
        factor * (ce * task + kl * divergence).sum(), task_loss + 0.7 * mean_divergence
    )


def test_without_a_counted_row_everything_is_zero():
    weights = weigh(torch.full_like(LABELS, -100))
    ce, kl, factor = weights.in_loss(1.0)
    assert not torch.stack((ce, kl)).any()
    assert factor == 0


def test_divergence_weight_zero_keeps_rows_of_the_divergence_counted():
    for normalizer in (None, 0, 1e-30, torch.tensor(1e-30)):
        weights = weigh(kl_mask=torch.ones_like(LABELS, dtype=torch.bool), kl_normalizer=normalizer)
        _, kl, _ = weights.in_loss(0.0)
        assert (kl != 0).all()
        assert (kl < 1e-30).all()


def test_a_divergence_weight_that_underflows_keeps_rows_counted_too():
    _, kl, _ = weigh(dtype=torch.float32, kl_normalizer=1e30).in_loss(1e-30)
    assert torch.equal(kl != 0, (LABELS != -100).flatten())
