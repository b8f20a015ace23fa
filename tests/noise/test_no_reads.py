"""A step reads no number from where the model lies: shown on tensors that have none.

Reading one, looking for true elements and mixing devices are errors on the device "meta"; on a card the first two
make the host wait, and so are found in ``tests/gpu`` only where there is one.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny_models import (
    bert,
    biased_bart,
    causal_batch,
    classification_batch,
    gemma2,
    generation_batch,
    gpt2,
    t5,
)

from swaft.functional import cross_entropy_symmetric_kl
from swaft.noise import R3F, RDrop, TaskLoss
from swaft.noise.loss import linear
from swaft.noise.loss.options import LossOptions
from swaft.noise.passes import SentCount

pytestmark = pytest.mark.unit

META = torch.device("meta")
MODELS = {
    "t5": (t5, generation_batch),
    "bart": (biased_bart, generation_batch),
    "gpt2": (gpt2, causal_batch),
    "gemma2": (gemma2, causal_batch),
    "bert": (bert, classification_batch),
}
OBJECTIVES = {
    "plain": TaskLoss(),
    "R3F": R3F(preset="relative", sigma=0.5),
    "one-sided, logits": R3F(preset="relative", sigma=0.5, detach="noised", fused=False),
    "R-Drop": RDrop(passes="doubled", label_smoothing=0.1),
}


@pytest.fixture
def without_numbers(monkeypatch):
    """What cannot be done on the device "meta", or is done on the first batch alone."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
    monkeypatch.setattr(SentCount, "read", lambda _: 7)
    monkeypatch.setattr("swaft.noise.objectives.prove", lambda *_, **__: False)


@pytest.mark.usefixtures("without_numbers")
@pytest.mark.parametrize(
    ("name", "kind"), [*product(("t5", "gpt2", "bert"), OBJECTIVES), ("bart", "R3F"), ("gemma2", "R3F")]
)
def test_a_step_of_an_objective_reads_no_number(name, kind):
    build, make = MODELS[name]
    model, batch = build().to(META).train(), {key: each.to(META) for key, each in make().items()}
    # transformers reads whether an encoder's mask is full, and a decoder's unless it computes plain attention, and
    # whether texts of a causal model without a mask are packed.
    model.set_attn_implementation("eager")
    if make is not causal_batch:
        del batch["attention_mask"]
    output = OBJECTIVES[kind](model, batch)
    output.loss.backward()
    assert {each.device for each in output.logged.values()} == {META}
    assert any(each.grad is not None for each in model.parameters())


def on_a_card(device: torch.device, dtype: torch.dtype) -> linear._Arithmetic:
    del device
    return linear._Arithmetic(
        given=dtype,
        wide=torch.float32,
        gradient=torch.float32 if dtype == torch.float32 else torch.bfloat16,
        narrow=True,
        rows=linear.torch_rows.rows,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["difference", "direct"])
def test_the_loss_inside_the_head_reads_no_number(monkeypatch, form, dtype):
    monkeypatch.setattr(linear._Arithmetic, "of", on_a_card)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    for detach, everything in product(("none", "noised", "target"), (False, True)):
        states = (made(200, 16, dtype=dtype), made(200, 16, dtype=dtype))
        difference = made(200, 16) if form == "difference" and everything else None
        weight, bias = made(601, 16, dtype=dtype), made(601, dtype=dtype) if everything else None
        rows = (made(200, dtype=torch.int64), made(200), made(200), made())
        found = linear.linear_loss(
            linear.LinearInputs(*states, difference, weight, bias, *rows),
            LossOptions(0.1, 1e-2, detach, everything, 0.5, 30.0 if everything else None, form),
            linear.Needs(True, detach != "noised", True, everything),
            operand_dtype=dtype,
            num_counted=190 if everything else None,
            chunk_bytes=1,
        )
        assert {each.device for each in found} == {META}


def test_the_loss_of_logits_reads_no_number():
    logits = torch.empty(4, 7, 33, device=META, requires_grad=True)
    rows = {"token_weight": torch.empty(4, 7, device=META), "kl_normalizer": torch.tensor(3.0)}
    mask = torch.empty(4, 7, dtype=torch.bool, device=META)
    labels = torch.empty(4, 7, dtype=torch.int64, device=META)
    loss = cross_entropy_symmetric_kl(
        logits, 2 * logits, labels, kl_mask=mask, ce_on_noised=True, **rows
    ).loss
    loss.backward()
    assert loss.device == META
