"""Small reference forms of the methods that noise stability is compared with: SMART, FreeLB, distillation.

Objectives like those of swaft: called with model and batch, they return loss, divergence and noise_to_signal.
Noise is added to the token embeddings, and has the size that the authors' code gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER = "teacher_logits"
"""Batch key under which :class:`Distillation` finds the teacher's logits, (B, C)."""
TINY = 1e-30
"""Divisor in place of 0: a token without a gradient gets no noise."""


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

    loss = L(x) + weight * max over noise of KL(p‖q) + KL(q‖p). The maximum is approximated by one step along the
    gradient at small random noise. Three forward passes and, with the ascent, about three backward passes.

    Args:
        weight: weight of the term.
        sigma: standard deviation of the random noise.
        step: largest entry of each token's noise after the step.
    """

    def __init__(self, weight: float = 1.0, sigma: float = 1e-5, step: float = 1e-3) -> None:
        self.weight, self.sigma, self.step = weight, sigma, step

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Output:
        """Run the passes, and combine them."""
        clean = model(**batch)
        embedded = embed(model, batch)
        noise = (self.sigma * torch.randn_like(embedded)).requires_grad_()
        found = symmetric_kl(clean.logits.detach(), noised_logits(model, batch, embedded.detach() + noise))
        (gradient,) = torch.autograd.grad(found, noise)
        worst = self.step * gradient / gradient.abs().amax(-1, keepdim=True).clamp(min=TINY)
        divergence = symmetric_kl(clean.logits, noised_logits(model, batch, embedded + worst))
        share = worst.norm() / embedded.detach().norm()
        return Output(clean.loss + self.weight * divergence, divergence.detach(), share)


class FreeLB(Rival):
    """FreeLB (Zhu et al. 2020, algorithm 1): the mean loss and gradient along an ascent of the noise.

    Between passes, which share their dropout masks (section 3.3), the noise takes a normalised gradient step and is
    projected back into the ball. All passes but the last run their backward pass here. Sizes are those of the
    authors' script for SST-2; each is an L2 norm over the tokens of a text.

    Args:
        passes: forward and backward passes.
        start: the noise starts uniform in ±start / sqrt(number of entries).
        step: length of a gradient step.
        radius: radius of the ball.
    """

    def __init__(self, passes: int = 2, start: float = 0.5, step: float = 0.1, radius: float = 0.4) -> None:
        self.passes, self.start, self.step, self.radius = passes, start, step, radius

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Output:
        """Run the passes; the returned loss is the last one's share, for the caller's backward pass."""
        embedded, real = embed(model, batch).detach(), batch["attention_mask"].unsqueeze(-1)
        sizes = embedded.shape[-1] * real.sum((1, 2), keepdim=True)
        noise = real * torch.empty_like(embedded).uniform_(-1, 1) * self.start / sizes.sqrt()
        for _ in range(self.passes - 1):
            noise = noise.detach().requires_grad_()
            with torch.random.fork_rng():
                self._loss(model, batch, embed(model, batch) + noise).backward()
            noise = noise.detach() + self.step * noise.grad / _norm(noise.grad).clamp(min=TINY)
            noise = noise * (self.radius / _norm(noise).clamp(min=TINY)).clamp(max=1)
        loss = self._loss(model, batch, embed(model, batch) + noise)
        return Output(loss, loss.detach() * 0, noise.norm() / embedded.norm())

    def _loss(self, model: nn.Module, batch: dict[str, Tensor], noised: Tensor) -> Tensor:
        return F.cross_entropy(noised_logits(model, batch, noised).float(), batch["labels"]) / self.passes


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


def _norm(noise: Tensor) -> Tensor:
    """L2 norm over the tokens of each text, (B, 1, 1)."""
    return noise.flatten(1).norm(dim=-1)[:, None, None]
