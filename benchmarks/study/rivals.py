"""Small reference forms of the methods that noise stability is compared with: SMART, FreeLB, distillation.

Objectives like those of swaft: called with model and batch, they return loss, divergence and noise_to_signal.
Noise is sized as in R3F's preset ``relative``, as a share of the root mean square of the token embeddings: here the
length of a token's noise over the root mean square length of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER = "teacher_logits"
"""Batch key under which :class:`Distillation` finds the teacher's logits, (B, C)."""


@dataclass(frozen=True)
class Output:
    """The output of an objective."""

    loss: Tensor
    divergence: Tensor
    noise_to_signal: Tensor


class Rival:
    """An objective that needs no preparation of the model."""

    def prepare_model(self, model: nn.Module) -> None:
        """Nothing to prepare."""


class Smart(Rival):
    """The smoothness term of SMART (Jiang et al. 2020, eqs. 1-2), one ascent step; without its proximal term.

    loss = L(x) + weight * max over noise of KL(p‖q) + KL(q‖p). The maximum is approximated by one step as long as
    the radius, along the gradient at random noise of a hundredth of the radius. Three forward passes and, with the
    ascent, about three backward passes.

    Args:
        weight: weight of the term.
        radius: length of the noise, as a share.
    """

    def __init__(self, weight: float = 1.0, radius: float = 0.3) -> None:
        self.weight, self.radius = weight, radius

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Output:
        """Run the passes, and combine them."""
        clean = model(**batch)
        embedded = embed(model, batch)
        length = _length(embedded, self.radius)
        noise = (_towards(torch.randn_like(embedded), length / 100)).requires_grad_()
        found = symmetric_kl(clean.logits.detach(), noised_logits(model, batch, embedded.detach() + noise))
        (gradient,) = torch.autograd.grad(found, noise)
        worst = _towards(gradient, length)
        divergence = symmetric_kl(clean.logits, noised_logits(model, batch, embedded + worst))
        share = worst.norm() / embedded.detach().norm()
        return Output(clean.loss + self.weight * divergence, divergence.detach(), share)


class FreeLB(Rival):
    """FreeLB (Zhu et al. 2020, algorithm 1): the mean loss and gradient along an ascent of the noise.

    The noise starts inside the ball. Between passes it takes a normalised gradient step as long as the radius, and
    is projected back into the ball. All passes but the last run their backward pass here.

    Args:
        steps: passes of the ascent.
        radius: radius of the ball, as a share.
    """

    def __init__(self, steps: int = 2, radius: float = 0.3) -> None:
        self.steps, self.radius = steps, radius

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Output:
        """Run the passes; the returned loss is the last one's share, for the caller's backward pass."""
        labels, noise, total = batch["labels"], None, 0.0
        for step in range(self.steps):
            embedded = embed(model, batch)
            length = _length(embedded, self.radius)
            if noise is None:
                noise = _towards(torch.randn_like(embedded), length * torch.rand_like(embedded[..., :1]))
            noise = noise.detach().requires_grad_()
            loss = F.cross_entropy(noised_logits(model, batch, embedded + noise).float(), labels) / self.steps
            total = total + loss.detach()
            if step + 1 < self.steps:
                loss.backward()
                noise = noise.detach() + _towards(noise.grad, length)
                noise = _towards(noise, torch.minimum(noise.norm(dim=-1, keepdim=True), length))
        share = noise.detach().norm() / embedded.detach().norm()
        return Output(loss, total * 0, share)


class Distillation(Rival):
    """Knowledge distillation (Hinton et al. 2015): (1 - share) cross entropy + share T² KL(teacher ‖ student).

    Args:
        share: weight of the teacher's term.
        temperature: T, which softens both distributions.
    """

    def __init__(self, share: float = 0.5, temperature: float = 2.0) -> None:
        self.share, self.temperature = share, temperature

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Output:
        """Run one pass, and compare it with the labels and the teacher."""
        teacher = batch[TEACHER].float() / self.temperature
        output = model(**{name: tensor for name, tensor in batch.items() if name != TEACHER})
        student = (output.logits.float() / self.temperature).log_softmax(-1)
        divergence = F.kl_div(student, teacher.log_softmax(-1), log_target=True, reduction="batchmean")
        loss = (1 - self.share) * output.loss + self.share * self.temperature**2 * divergence
        return Output(loss, divergence.detach(), divergence.detach() * 0)


def symmetric_kl(clean: Tensor, noised: Tensor) -> Tensor:
    """``KL(p‖q) + KL(q‖p)``, mean over rows, in fp32."""
    p, q = clean.float().log_softmax(-1), noised.float().log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Token embeddings (B, L, d), before positions and normalisation."""
    return model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]


def noised_logits(model: nn.Module, batch: dict[str, Tensor], embedded: Tensor) -> Tensor:
    """Logits (B, C) from embeddings instead of ids."""
    arguments: dict[str, Any] = {k: v for k, v in batch.items() if k not in ("input_ids", "labels")}
    return model(inputs_embeds=embedded, **arguments).logits


def _length(embedded: Tensor, radius: float) -> Tensor:
    return radius * embedded.detach().square().sum(-1).mean().sqrt()


def _towards(direction: Tensor, length: Tensor) -> Tensor:
    """Each token's vector scaled to a given length; 0 stays 0."""
    return direction * (length / direction.norm(dim=-1, keepdim=True).clamp(min=1e-30))
