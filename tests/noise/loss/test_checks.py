"""What does not fit is refused by name, by the loss of logits and by the loss of a head alike."""

from __future__ import annotations

import pytest
import torch
from loss_oracle import head

from swaft.errors import ConfigError, DataError
from swaft.functional import cross_entropy_symmetric_kl, linear_cross_entropy_symmetric_kl, symmetric_kl

pytestmark = pytest.mark.unit

ROWS, WIDTH, CLASSES = 4, 8, 9
META = torch.device("meta")
HEAD = head(noise=0.1, rows=ROWS, width=WIDTH, classes=CLASSES)
LOGITS = [states @ HEAD.weight.mT for states in HEAD[:2]]


def of_logits(*, labels=None, **options):
    return cross_entropy_symmetric_kl(*LOGITS, HEAD.labels if labels is None else labels, **options)


def of_head(**operands):
    return linear_cross_entropy_symmetric_kl(**(HEAD._asdict() | {"hidden_difference": None} | operands))


both = pytest.mark.parametrize("loss", [of_logits, of_head])


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("labels", torch.zeros(ROWS), "torch.float32"),
        ("labels", torch.zeros(ROWS, dtype=torch.bool), "torch.bool"),
        ("labels", torch.zeros(ROWS, dtype=torch.long, device=META), "on meta"),
        ("token_weight", torch.ones(ROWS, 1), r"shape \(4, 1\)"),
        ("token_weight", torch.ones(ROWS, device=META), "on meta"),
        ("token_weight", torch.ones(ROWS, requires_grad=True), "requires a gradient"),
        (
            "kl_mask",
            torch.ones(ROWS, 1, dtype=torch.bool),
            r"shape \(4, 1\); expected that of the labels, \(4,\)",
        ),
        ("kl_mask", torch.ones(ROWS), "torch.float32"),
        ("kl_mask", torch.ones(ROWS, dtype=torch.int32), "torch.int32"),
        ("kl_mask", torch.ones(ROWS, dtype=torch.bool, device=META), "on meta"),
        ("kl_normalizer", torch.ones(1), r"shape \(1,\)"),
        ("kl_normalizer", torch.ones(ROWS), r"shape \(4,\)"),
        ("kl_normalizer", torch.tensor(3.0, device=META), "on meta"),
        ("kl_normalizer", torch.tensor(3.0, requires_grad=True), "requires a gradient"),
        ("kl_normalizer", -1.0, "-1.0; expected a finite number, 0 or more"),
        ("kl_normalizer", float("nan"), "nan; expected a finite number"),
        (
            "kl_normalizer",
            torch.tensor(-1.0),
            "1 of 1 values that are negative or not finite, the first -1",
        ),
        ("kl_normalizer", torch.tensor(torch.inf), "the first inf; expected 0 or more"),
        (
            "token_weight",
            torch.tensor([1.0, -1.0, 2.0, -0.5]),
            "2 of 4 values .* the first -1; expected 0",
        ),
        ("token_weight", torch.tensor([1.0, torch.nan, 2.0, 0.0]), "1 of 4 values .* the first nan"),
        ("ce_on_noised", "no", "'no'; expected one of False, True"),
        ("detach", "both", "'both'; expected one of none, clean, noised, target"),
        ("reduction", "none", "'none'; expected one of mean, sum"),
        ("label_smoothing", None, "None; expected a finite number, from 0 to 1"),
        ("label_smoothing", 1.5, "1.5; expected a finite number, from 0 to 1"),
        ("z_loss", -1.0, "-1.0; expected a finite number, 0 or more"),
        ("divergence_weight", float("inf"), "inf; expected a finite number"),
        ("divergence_weight", torch.tensor(0.5), r"tensor\(0.5000\); expected a finite number"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused_by_name_by_both_losses(name, value, found):
    for loss in (of_logits, of_head):
        with pytest.raises(ConfigError, match=f"{name} .*{found}"):
            loss(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("hidden", torch.zeros(ROWS, WIDTH, dtype=torch.long), "torch.int64; expected a floating dtype"),
        ("noised_hidden", torch.zeros(ROWS, WIDTH, device=META), "on meta; expected the device of hidden"),
        ("noised_hidden", torch.zeros(WIDTH), r"\(8,\)"),
        ("weight", torch.zeros(CLASSES, WIDTH, device=META), "on meta"),
        ("weight", torch.zeros(0, WIDTH), r"shape \(0, 8\); expected \(V, 8\), V at least 1"),
        ("weight", torch.zeros(WIDTH), r"shape \(8,\)"),
        ("bias", torch.zeros(CLASSES, dtype=torch.int32), "torch.int32"),
        ("bias", torch.zeros(CLASSES, 1), r"shape \(9, 1\)"),
        ("bias", torch.zeros(CLASSES, device=META), "on meta"),
        ("hidden_difference", torch.zeros(ROWS, WIDTH, device=META), "on meta"),
        ("hidden_difference", torch.zeros(ROWS, WIDTH).int(), "torch.int32"),
        ("form", "split", "'split'; expected one of difference, direct"),
        ("logit_scale", 0.0, "0.0; expected a finite number, more than 0"),
        ("softcap", float("nan"), "nan; expected a finite number, more than 0, or None"),
        ("num_counted", torch.tensor(4), r"tensor\(4\); expected a number of rows"),
        ("chunk_bytes", 1e6, "1000000.0; expected a number of bytes"),
        ("chunk_bytes", -1, "-1; expected a number of bytes"),
    ],
)
def test_what_does_not_fit_the_head_is_refused_by_name(name, value, found):
    with pytest.raises(ConfigError, match=f"{name} .*{found}"):
        of_head(**{name: value})


@pytest.mark.parametrize(
    ("noised_logits", "found"),
    [
        (torch.zeros(9), "do not fit"),
        (torch.zeros(4, 9, dtype=torch.long), "noised_logits is torch.int64"),
        (torch.zeros(4, 9, device=META), "noised_logits is on meta"),
    ],
)
def test_logits_are_not_broadcast_nor_taken_for_what_they_are_not(noised_logits, found):
    with pytest.raises(ConfigError, match=found):
        symmetric_kl(torch.zeros(4, 9), noised_logits)
    with pytest.raises(ConfigError, match=found):
        cross_entropy_symmetric_kl(torch.zeros(4, 9), noised_logits, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("shape", [(), (4, 0)])
def test_logits_without_classes_are_refused(shape):
    with pytest.raises(ConfigError, match="V at least 1"):
        symmetric_kl(torch.zeros(shape), torch.zeros(shape))


@both
@pytest.mark.parametrize("label", [CLASSES, -1, 2**40])
def test_a_label_out_of_range_is_refused_on_a_cpu(loss, label):
    with pytest.raises(
        DataError, match=f"1 of 4 labels are not valid classes, the first of them {label}; expected 0 to 8"
    ):
        loss(labels=torch.tensor([0, -100, label, 1]))


@both
def test_a_label_out_of_range_makes_the_loss_nan_where_the_host_cannot_look(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert compiled(labels=torch.tensor([0, -100, CLASSES, 1])).loss.isnan()
    assert compiled(labels=torch.tensor([0, -100, CLASSES - 1, 1])).loss.isfinite()


@both
def test_a_negative_factor_makes_the_loss_nan_where_the_host_cannot_look(loss):
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0])
    assert compiled(token_weight=weight - 1).loss.isnan()
    assert compiled(kl_normalizer=-weight[0]).loss.isnan()
    assert compiled(token_weight=weight, kl_normalizer=weight[1]).loss.isfinite()


@both
def test_a_factor_of_a_row_that_does_not_count_may_be_anything(loss):
    labels = torch.tensor([0, -100, -100, 1])
    expected = loss(labels=labels).loss
    assert loss(labels=labels, token_weight=torch.tensor([1.0, -3.0, torch.nan, 1.0])).loss == expected
    with pytest.raises(ConfigError, match="token_weight has 1 of 4 values"):
        loss(
            labels=labels,
            token_weight=torch.tensor([1.0, -3.0, torch.nan, 1.0]),
            kl_mask=torch.tensor([True, True, False, True]),
        )


@both
def test_labels_of_32_bits_are_labels(loss):
    labels = torch.tensor([0, -100, 8, 1])
    assert torch.equal(loss(labels=labels.int()).loss, loss(labels=labels).loss)


@both
def test_a_constant_may_require_a_gradient_where_none_is_recorded(loss):
    with torch.no_grad():
        assert loss(token_weight=torch.ones(ROWS, requires_grad=True)).loss.isfinite()


@both
@pytest.mark.parametrize("normalizer", [torch.tensor(4.0, dtype=torch.float64), torch.tensor(4)])
def test_the_type_of_a_normalizer_does_not_become_that_of_the_loss(loss, normalizer):
    for ours, expected in zip(loss(kl_normalizer=normalizer), loss(kl_normalizer=4), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected)


def test_a_single_row_needs_no_leading_dimension():
    inputs = head(noise=0.1, rows=1, width=WIDTH, classes=CLASSES)
    hidden, noised_hidden, label = inputs.hidden[0], inputs.noised_hidden[0], inputs.labels[0]
    expected = linear_cross_entropy_symmetric_kl(*inputs[:4])
    alone = linear_cross_entropy_symmetric_kl(hidden, noised_hidden, inputs.weight, label)
    logits = cross_entropy_symmetric_kl(inputs.weight @ hidden, inputs.weight @ noised_hidden, label)
    for ours, other, theirs in zip(alone, logits, expected, strict=True):
        assert ours.shape == other.shape == ()
        torch.testing.assert_close(ours, theirs.reshape(()))
        torch.testing.assert_close(other, theirs.reshape(()))


def test_a_difference_of_the_wrong_sign_is_refused():
    wrong = HEAD.noised_hidden - HEAD.hidden
    with pytest.raises(ConfigError, match="Turn its sign"):
        of_head(hidden_difference=wrong)
    assert of_head(hidden_difference=-wrong).loss.isfinite()


def test_a_compiled_loss_is_nan_where_the_difference_has_the_wrong_sign():
    compiled = torch.compile(of_head, backend="eager", fullgraph=True)
    wrong = HEAD.noised_hidden - HEAD.hidden
    assert compiled(hidden_difference=wrong).loss.isnan()
    assert compiled(hidden_difference=-wrong).loss.isfinite()


def test_a_difference_that_rounding_took_out_of_the_hidden_states_is_taken_as_given():
    hidden = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    difference = torch.linspace(-1e-6, 1e-6, ROWS * WIDTH).reshape(ROWS, WIDTH)
    noised = hidden.clone()
    noised[0, 0] += 0.25 if difference[0, 0] > 0 else -0.25  # one entry rounded, and to the wrong side
    loss = of_head(
        hidden=hidden, noised_hidden=noised, weight=HEAD.weight.bfloat16(), hidden_difference=difference
    )
    assert loss.loss.isfinite()
    assert loss.divergence > 0
