"""The reference forms of SMART, FreeLB and distillation, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.study import rivals

pytestmark = pytest.mark.unit


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture
def batch():
    ids = torch.randint(1, 50, (4, 6))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([0, 1, 2, 0]),
    }


def recorded_noises(monkeypatch):
    """The noise of every noised pass, filled as they run."""
    noises, plain = [], rivals.noised_logits

    def recorded(network, given, embedded):
        noises.append((embedded - rivals.embed(network, given)).detach())
        return plain(network, given, embedded)

    monkeypatch.setattr(rivals, "noised_logits", recorded)
    return noises


def test_smart_finds_noise_that_hurts_more_than_random_noise_of_its_size(model, batch, monkeypatch):
    noises = recorded_noises(monkeypatch)
    found = rivals.Smart(weight=2.0, sigma=1e-3, step=1e-2)(model, batch)
    clean = model(**batch)
    torch.testing.assert_close(found.loss, clean.loss + 2.0 * found.divergence)
    worst, embedded = noises[-1], rivals.embed(model, batch)
    torch.testing.assert_close(worst.abs().amax(-1), torch.full((4, 6), 1e-2), rtol=1e-3, atol=0.0)
    at_random = []
    for _ in range(20):
        noise = F.normalize(torch.randn_like(embedded), dim=-1) * worst.norm(dim=-1, keepdim=True)
        noised = rivals.noised_logits(model, batch, embedded + noise)
        at_random.append(rivals.symmetric_kl(clean.logits, noised).item())
    assert float(found.divergence) > max(at_random)


def test_freelb_leaves_the_mean_gradient_of_its_passes_and_stays_in_the_ball(model, batch, monkeypatch):
    losses, noises = [], recorded_noises(monkeypatch)
    batch["attention_mask"][0, 4:] = 0
    rivals.FreeLB(passes=3, start=0.05, step=0.1, radius=0.12)(model, batch).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    sizes = torch.stack([noise.flatten(1).norm(dim=-1) for noise in noises])
    assert sizes[0].max() < 0.05 < sizes[1].min()
    torch.testing.assert_close(sizes[2], torch.full((4,), 0.12), rtol=1e-3, atol=0.0)
    assert all(noise[0, 4:].abs().max() < 1e-6 for noise in noises)  # none on padding
    model.zero_grad()
    for noise in noises[:3]:
        logits = rivals.noised_logits(model, batch, rivals.embed(model, batch) + noise)
        losses.append(F.cross_entropy(logits, batch["labels"]).item())
        (F.cross_entropy(logits, batch["labels"]) / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert losses[0] < losses[1] < losses[2]  # it ascends


def test_the_passes_of_freelb_share_their_dropout_masks(model, batch):
    model.config.hidden_dropout_prob = 0.5
    dropping = BertForSequenceClassification(model.config).train()
    seen = []
    dropping.bert.embeddings.dropout.register_forward_hook(lambda _, given, output: seen.append(output == 0))
    rivals.FreeLB(passes=2)(dropping, batch)
    assert 0.4 < seen[0].float().mean() < 0.6
    assert torch.equal(*seen)


def test_distillation_is_cross_entropy_and_the_softened_divergence_from_the_teacher(model, batch):
    teacher = torch.randn(4, 3)
    found = rivals.Distillation(share=0.25, temperature=2.0)(model, batch | {rivals.TEACHER: teacher})
    output = model(**batch)
    p, q = (teacher / 2).softmax(-1), (output.logits / 2).softmax(-1)
    expected = 0.75 * output.loss + 0.25 * 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found.loss, expected)
    same = rivals.Distillation(share=1.0)(model, batch | {rivals.TEACHER: output.logits.detach()})
    assert float(same.loss) == pytest.approx(0.0, abs=1e-6)
