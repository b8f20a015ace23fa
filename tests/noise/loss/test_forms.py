"""The loss of a head is the loss of its logits, whatever is asked of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import head, leaves, relative_error

from swaft.functional import cross_entropy_symmetric_kl, linear_cross_entropy_symmetric_kl

pytestmark = pytest.mark.unit

ROWS, WIDTH, CLASSES = 6, 3, 11
SHAPE = (2, 3)
SOME, NONE, ALL = (
    torch.tensor(rows, dtype=torch.bool).reshape(SHAPE) for rows in ([1, 0, 1, 1, 0, 1], [0] * 6, [1] * 6)
)
ABSENT = torch.zeros(CLASSES, dtype=torch.float64).index_fill(0, torch.tensor([0, 7]), -torch.inf)

options_of_both = st.fixed_dictionaries(
    {
        "divergence_weight": st.sampled_from([0, 0.7, 1e-42]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "token_weight": st.sampled_from([None, torch.arange(6.0).reshape(SHAPE), torch.zeros(SHAPE)]),
        "kl_mask": st.sampled_from([None, SOME, NONE, ALL]),
        "kl_normalizer": st.sampled_from([None, 0, 2.5, torch.tensor(3), 1e-20]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "detach": st.sampled_from(["none", "clean", "noised", "target"]),
        "ce_on_noised": st.booleans(),
    }
)
options_of_head = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["difference", "direct"]),
        "softcap": st.sampled_from([None, 3.0]),
        "logit_scale": st.sampled_from([1.0, 0.4]),
        "num_counted": st.sampled_from([None, ROWS]),
    }
)


@given(
    both=options_of_both,
    of_head=options_of_head,
    counted=st.sampled_from([SOME, NONE, ALL]),
    noise=st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
    bias=st.sampled_from([None, torch.linspace(-1, 1, CLASSES, dtype=torch.float64), ABSENT]),
)
@settings(max_examples=150, deadline=None)
def test_the_loss_of_a_head_is_that_of_its_logits(both, of_head, counted, noise, bias):
    inputs = head(noise=noise, rows=ROWS, width=WIDTH, classes=CLASSES, dtype=torch.float64)
    labels = torch.where(counted, torch.tensor([[1, 2, 3], [10, 9, 8]]), -100)
    if bias is ABSENT:
        both = both | {"label_smoothing": 0.0}  # its target has every class
        of_head = of_head | {"softcap": None}  # which would make it -3
    states = leaves(*(states.reshape(*SHAPE, WIDTH) for states in inputs[:2]), inputs.weight)
    logits = []
    for hidden in states[:2]:
        raw = of_head["logit_scale"] * hidden @ states[2].mT + (0 if bias is None else bias)
        cap = of_head["softcap"]
        logits.append(raw if cap is None else cap * torch.tanh(raw / cap))
    expected = cross_entropy_symmetric_kl(*logits, labels, **both)
    computed = linear_cross_entropy_symmetric_kl(*states, labels, bias, **both, **of_head)

    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)  # shapes as well
    gradients = (
        torch.autograd.grad(result.loss, states, materialize_grads=True, allow_unused=True)
        for result in (computed, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10 * (1 + float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_of_the_operands_does_not_matter(dtype):
    inputs = head(noise=0.1, rows=ROWS, width=WIDTH, classes=CLASSES)
    hidden, noised_hidden, weight = (tensor.to(dtype) for tensor in inputs[:3])
    wide = torch.zeros(2, 3, 2 * WIDTH, dtype=dtype)
    wide[..., ::2] = hidden.reshape(3, 2, WIDTH).transpose(0, 1)
    layouts = (wide[..., ::2], noised_hidden.reshape(3, 2, WIDTH).transpose(0, 1), weight.mT.contiguous().mT)
    labels = inputs.labels.reshape(3, 2).mT
    assert not any(tensor.is_contiguous() for tensor in (*layouts, labels))

    plain = [tensor.contiguous().requires_grad_() for tensor in layouts]
    strange = [tensor.detach().requires_grad_() for tensor in layouts]
    expected = linear_cross_entropy_symmetric_kl(*plain, labels.contiguous()).loss
    computed = linear_cross_entropy_symmetric_kl(*strange, labels).loss
    assert relative_error(computed, expected) < 1e-6
    for ours, theirs in zip(
        torch.autograd.grad(computed, strange), torch.autograd.grad(expected, plain), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("spoiled", "options"),
    [
        *itertools.product(
            ("hidden", "noised_hidden", "hidden_difference"),
            ({}, {"detach": "noised"}, {"divergence_weight": 0.0}),
        ),
        ("hidden", {"form": "direct"}),
        ("noised_hidden", {"form": "direct"}),
    ],
)
def test_a_number_that_is_none_in_a_counted_row_reaches_the_loss(spoiled, options, value):
    operands = head(noise=0.1, rows=ROWS, width=WIDTH, classes=CLASSES)._asdict()
    if spoiled != "hidden_difference":
        del operands["hidden_difference"]
    operands[spoiled] = operands[spoiled].clone()
    operands[spoiled][4, 1] = value
    assert linear_cross_entropy_symmetric_kl(**operands, **options).loss.isnan()
