from __future__ import annotations

import pytest
import torch
from loss_oracle import head, naive_head_loss, relative_error

from swaft.functional import linear_cross_entropy_symmetric_kl
from swaft.noise.loss.losses import reference_rows
from swaft.noise.loss.options import LossOptions

pytestmark = pytest.mark.unit

BIAS = torch.linspace(-1, 1, 31, dtype=torch.float64)


def reference_logits(
    hidden: torch.Tensor,
    noised_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden_difference: torch.Tensor,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, z' and d = z - z' of a language-model head.

    raw = alpha h W^T + b,  z = kappa tanh(raw / kappa),  and with draw = alpha (h - h') W^T
    d = kappa tanh(draw / kappa) (1 - tanh(raw / kappa) tanh((raw - draw) / kappa)),
    which is the difference of the two soft-capped logits without a cancellation.
    """
    raw = options.logit_scale * hidden @ weight.mT
    noised_raw = options.logit_scale * noised_hidden @ weight.mT
    if bias is not None:
        raw, noised_raw = raw + bias, noised_raw + bias
    draw = options.logit_scale * hidden_difference.detach() @ weight.detach().mT
    kappa = options.softcap
    if kappa is None:
        return raw, noised_raw, draw
    squashed, noised_squashed = torch.tanh(raw / kappa), torch.tanh(noised_raw / kappa)
    factor = 1 - squashed.detach() * torch.tanh((raw.detach() - draw) / kappa)
    return kappa * squashed, kappa * noised_squashed, kappa * torch.tanh(draw / kappa) * factor


def reference_loss(hidden, noised_hidden, weight, labels, difference, options: LossOptions) -> torch.Tensor:
    logits = reference_logits(hidden, noised_hidden, weight, BIAS, difference, options)
    rows = reference_rows(*logits, labels, options)
    return (rows.task + rows.divergence).mean()


def states_of(inputs) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]


@pytest.mark.parametrize("ce_on_noised", [False, True])
@pytest.mark.parametrize("detach", ["none", "clean", "noised", "target"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("noise", [1e-7, 1e-4, 0.5, 5.0])
def test_the_fused_loss_is_its_slow_twin(noise, softcap, detach, ce_on_noised):
    inputs = head(noise=noise, dtype=torch.float64, classes=31)
    shared = {
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "detach": detach,
        "ce_on_noised": ce_on_noised,
        "logit_scale": 0.5,
        "softcap": softcap,
    }
    states = states_of(inputs)
    difference = inputs.hidden_difference
    expected = reference_loss(*states, inputs.labels, difference, LossOptions(**shared))
    exact = torch.autograd.grad(expected, states, materialize_grads=True, allow_unused=True)

    result = linear_cross_entropy_symmetric_kl(
        *states[:3], inputs.labels, BIAS, hidden_difference=difference, **shared
    )
    assert relative_error(result.loss, expected) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(result.loss, states), exact, strict=True):
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_slow_twin_is_the_definition_where_float64_can_tell(softcap):
    inputs = head(noise=0.5, dtype=torch.float64, classes=31)
    states = states_of(inputs)
    options = LossOptions(label_smoothing=0.1, z_loss=1e-2, logit_scale=0.5, softcap=softcap)
    ours = reference_loss(*states, inputs.labels, inputs.hidden_difference, options)
    definition = naive_head_loss(
        *states, inputs.labels, BIAS, label_smoothing=0.1, z_loss=1e-2, logit_scale=0.5, softcap=softcap
    )
    torch.testing.assert_close(ours, definition, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, states), torch.autograd.grad(definition, states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_slow_twin_passes_gradcheck():
    inputs = head(noise=0.5, dtype=torch.float64, classes=31, rows=3, width=2)
    options = LossOptions(label_smoothing=0.1, z_loss=1e-2, softcap=3.0)

    def loss(hidden, noised_hidden, weight):
        return reference_loss(hidden, noised_hidden, weight, inputs.labels, hidden - noised_hidden, options)

    assert torch.autograd.gradcheck(loss, states_of(inputs))
