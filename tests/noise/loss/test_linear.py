from __future__ import annotations

import pytest
import torch
from loss_oracle import Head, head, head_divergence, leaves, naive, naive_head_loss, relative_error, worst
from torch.utils._python_dispatch import TorchDispatchMode

from swaft.errors import ConfigError
from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise.loss import linear
from swaft.noise.loss.linear import LinearInputs, Needs, linear_loss
from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import rows as torch_rows

pytestmark = pytest.mark.unit

SMALLEST_CHUNK = 1
"""In bytes: a chunk then has the least number of rows, 128."""


def value_and_gradients(inputs: Head, **options) -> list[torch.Tensor]:
    """J and its gradients alone: no label counts, every row counts for the divergence."""
    states = leaves(*inputs[:3])
    result = linear_cross_entropy_symmetric_kl(
        *states,
        torch.full_like(inputs.labels, -100),
        kl_mask=torch.ones_like(inputs.labels, dtype=torch.bool),
        **options,
    )
    return [result.loss, *torch.autograd.grad(result.loss, states)]


@pytest.mark.parametrize("labels", ["peaked", "any"])
@pytest.mark.parametrize("noise", [1e-8, 1e-4, 0.1, 1.0, 10.0])
def test_fp32_keeps_five_in_a_million_at_every_noise(noise, labels):
    inputs = head(noise=noise, labels=labels)
    computed = value_and_gradients(inputs, hidden_difference=inputs.hidden_difference)
    assert worst(computed, head_divergence(inputs)) < 5e-6


@pytest.mark.parametrize("noise", [30.0, 60.0])
def test_fp32_keeps_its_accuracy_for_passes_far_apart(noise):
    inputs = head(noise=noise)
    computed = value_and_gradients(inputs, hidden_difference=inputs.hidden_difference)
    assert worst(computed, head_divergence(inputs)) < 5e-5


@pytest.mark.parametrize("labels", ["peaked", "any"])
@pytest.mark.parametrize("noise", [1e-8, 1e-5, 1e-2, 0.5, 2.0])
def test_bf16_operands_in_difference_form_are_right_at_every_noise(noise, labels):
    inputs = head(noise=noise, labels=labels, dtype=torch.bfloat16)
    computed = value_and_gradients(inputs, hidden_difference=inputs.hidden_difference)
    exact = head_divergence(inputs)
    assert relative_error(computed[0], exact.value) < 2e-3
    assert worst(computed[1:], exact[1:]) < 5e-3


@pytest.mark.parametrize("noise", [0.05, 0.5, 10.0, 60.0])
def test_bf16_operands_in_direct_form_are_right_where_the_passes_are_apart(noise):
    inputs = head(noise=noise, dtype=torch.bfloat16)
    computed = value_and_gradients(inputs, form="direct")
    exact = head_divergence(
        inputs._replace(hidden_difference=inputs.hidden.double() - inputs.noised_hidden.double())
    )
    assert relative_error(computed[0], exact.value) < 2e-3
    assert worst(computed[1:], exact[1:]) < 5e-3


def test_logits_rounded_to_bf16_would_miss_that_bar():
    inputs = head(noise=1e-2, dtype=torch.bfloat16)
    z, noised_z = (states @ inputs.weight.mT for states in (inputs.hidden, inputs.noised_hidden))
    assert relative_error(naive(z.double(), noised_z.double()).mean(), head_divergence(inputs).value) > 0.1


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("ce_on_noised", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("noise", [1e-2, 2.0])
def test_every_feature_together_is_the_loss_of_full_logits(noise, softcap, ce_on_noised, form):
    inputs = head(noise=noise, dtype=torch.float64, classes=97)
    labels = inputs.labels.index_fill(0, torch.tensor([2, 3, 11]), -100)
    bias = torch.linspace(-1, 1, 97, dtype=torch.float64)
    options = {
        "logit_scale": 0.6,
        "softcap": softcap,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "divergence_weight": 0.7,
        "ce_on_noised": ce_on_noised,
    }
    states = leaves(*inputs[:3], bias)
    expected = naive_head_loss(*states[:3], labels, states[3], **options)
    exact = torch.autograd.grad(expected, states)

    result = linear_cross_entropy_symmetric_kl(*states[:3], labels, states[3], form=form, **options)
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=0)
    assert worst(torch.autograd.grad(result.loss, states), exact) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gradient_sums_over_all_counted_rows(dtype):
    inputs = head(noise=1e-2, dtype=dtype, classes=97)
    states = leaves(*inputs[:3], torch.zeros(97, dtype=dtype))
    result = linear_cross_entropy_symmetric_kl(*states[:3], inputs.labels, states[3], logit_scale=0.5)
    (gradient,) = torch.autograd.grad(result.loss, states[3])

    exact = leaves(*(tensor.double() for tensor in (*inputs[:3], states[3])))
    loss = naive_head_loss(*exact[:3], inputs.labels, exact[3], logit_scale=0.5)
    bar = 5e-6 if dtype == torch.float32 else 5e-3
    assert relative_error(gradient, torch.autograd.grad(loss, exact[3])[0]) < bar


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("detach", ["none", "noised"])
def test_the_size_of_a_chunk_does_not_matter(detach, form):
    inputs = head(noise=0.1, rows=300, classes=33)
    states = leaves(*inputs[:3], torch.zeros(33))
    whole, chunked = (
        linear_cross_entropy_symmetric_kl(
            *states[:3], inputs.labels, states[3], form=form, detach=detach, chunk_bytes=chunk_bytes
        )
        for chunk_bytes in (None, SMALLEST_CHUNK)
    )
    assert relative_error(chunked.loss, whole.loss) < 1e-6
    gradients = (torch.autograd.grad(result.loss, states) for result in (chunked, whole))
    assert worst(*gradients) < 1e-6


@pytest.mark.parametrize("num_counted", [None, 16, 20, 1000])
def test_rows_that_count_for_nothing_may_hold_anything(num_counted):
    inputs = head(noise=1e-3, classes=33)
    counted = torch.arange(24) % 3 != 1
    counted[0] = True
    clean = [tensor[counted] for tensor in inputs[:2]]
    spoiled = [tensor.clone() for tensor in inputs[:2]]
    for tensor in spoiled:
        tensor[~counted] = torch.nan
    labels = inputs.labels.masked_fill(~counted, -100)

    states = leaves(*spoiled, inputs.weight)
    result = linear_cross_entropy_symmetric_kl(*states, labels, num_counted=num_counted)
    alone_states = leaves(*clean, inputs.weight)
    alone = linear_cross_entropy_symmetric_kl(*alone_states, labels[counted])

    torch.testing.assert_close(result.loss, alone.loss)
    hidden, noised_hidden, weight = torch.autograd.grad(result.loss, states)
    expected = torch.autograd.grad(alone.loss, alone_states)
    assert worst((hidden[counted], noised_hidden[counted], weight), expected) < 5e-6
    for tensor in (hidden[~counted], noised_hidden[~counted], *(values[~counted] for values in result[3:])):
        assert not tensor.any()


@pytest.mark.parametrize("num_counted", [0, 2, 3, 4])
def test_where_the_host_must_not_wait_counted_rows_come_first_in_their_order(num_counted):
    counted = torch.tensor([False, True, False, True, True])
    expected = [1, 3, 4, 0][:num_counted]
    assert linear.counted_first(counted, num_counted).tolist() == expected


@pytest.mark.parametrize("num_counted", [None, 5, 6])
def test_without_a_bound_below_the_number_of_rows_all_are_computed(num_counted):
    assert linear.counted_first(torch.ones(5, dtype=torch.bool), num_counted) is None


def test_a_number_of_counted_rows_that_is_too_small_is_not_silent():
    inputs = head(noise=1e-3, classes=33)
    states = leaves(*inputs[:3])
    result = linear_cross_entropy_symmetric_kl(*states, inputs.labels, num_counted=23)
    assert result.loss.isnan()
    assert torch.autograd.grad(result.loss, states)[2].isnan().all()


@pytest.mark.parametrize("form", ["difference", "direct"])
def test_equal_passes_have_exactly_no_divergence(form):
    inputs = head(noise=0.0)
    result, *gradients = value_and_gradients(inputs, form=form)
    for tensor in (result, *gradients):
        assert not tensor.any()


def test_one_class_costs_nothing():
    inputs = head(noise=0.1, classes=1)
    states = leaves(*inputs[:3])
    result = linear_cross_entropy_symmetric_kl(*states, inputs.labels)
    for tensor in (result.loss, *torch.autograd.grad(result.loss, states)):
        assert not tensor.any()


class Allocations(TorchDispatchMode):
    """The memory that operations inside came up with, each block once, in elements."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = (storage, storage.nbytes() // tensor.itemsize)
        return result

    def elements_beside(self, *known: torch.Tensor) -> list[int]:
        known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}
        return [size for key, (_, size) in self._storages.items() if key not in known_storages]


@pytest.mark.parametrize("form", ["difference", "direct"])
def test_no_tensor_has_the_size_of_the_logits_and_only_the_gradient_that_of_the_weight(form):
    rows, classes, width = 1280, 211, 32
    inputs = head(noise=1e-2, rows=rows, classes=classes, width=width)
    weights = torch.ones(rows)
    operands = LinearInputs(
        *inputs[:2], None, inputs.weight, None, inputs.labels, weights, weights, torch.tensor(1.0)
    )
    with Allocations() as allocations:
        linear_loss(
            operands,
            LossOptions(form=form),
            Needs(True, True, True, False),
            operand_dtype=torch.float32,
            chunk_bytes=SMALLEST_CHUNK,
        )
    sizes = allocations.elements_beside(*inputs)
    assert max(sizes) == 3 * 128 * classes < rows * classes
    assert sizes.count(classes * width) == 1


def test_a_kernel_with_gradients_in_buffers_of_its_own_gives_the_same(monkeypatch):
    inputs = head(noise=1e-2, rows=300, classes=33)
    expected = value_and_gradients(inputs, chunk_bytes=SMALLEST_CHUNK)

    def kernel(rows, *others):
        copies = rows._replace(raw=rows.raw.clone(), raw_noise=rows.raw_noise.clone())
        return torch_rows(copies, *others)

    monkeypatch.setattr(linear, "row_kernel", lambda *_: kernel)
    computed = value_and_gradients(inputs, chunk_bytes=SMALLEST_CHUNK)
    assert worst(computed, expected) < 1e-6


def test_hidden_difference_has_no_place_in_the_direct_form():
    inputs = head(noise=1e-2)
    with pytest.raises(ConfigError, match="hidden_difference was given with form='direct'"):
        linear_cross_entropy_symmetric_kl(
            *inputs[:4], hidden_difference=inputs.hidden_difference, form="direct"
        )


def test_every_misfit_is_named_at_once():
    inputs = head(noise=1e-2, rows=4, classes=9, width=8)
    with pytest.raises(ConfigError) as caught:
        linear_cross_entropy_symmetric_kl(
            inputs.hidden,
            inputs.noised_hidden[:3],
            inputs.weight,
            inputs.labels,
            torch.zeros(8),
            hidden_difference=inputs.hidden_difference[:2],
            num_counted=-1,
            chunk_bytes=0,
        )
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "hidden",
        "bias",
        "hidden_difference",
        "num_counted",
        "chunk_bytes",
    ]
