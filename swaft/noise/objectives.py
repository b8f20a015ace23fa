"""The objectives that train a model: plain fine-tuning, R3F, R4F and R-Drop, all called the same way."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from swaft.errors import ConfigError, NoiseError
from swaft.noise.arrival import prove_arrival
from swaft.noise.checks import check_model, check_output, generates
from swaft.noise.dropout import RngState
from swaft.noise.embedding import (
    Embedded,
    EmbeddingSite,
    embedding_hook,
    find_site,
    measure,
    root_mean_square,
)
from swaft.noise.generator import Noise, draw_noise
from swaft.noise.loss import Detach, symmetric_kl
from swaft.noise.presets import (
    Masks,
    NoiseSettings,
    Reduction,
    is_finite_and_not_negative,
    resolve_settings,
)
from swaft.noise.spectral import Layers, normalise_head, normalised_layers, power_iteration_paused
from swaft.noise.wrappers import current_rank

IGNORE_INDEX = -100
"""The label of a row that does not count, as in Hugging Face models."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """One micro-step's loss and what it is made of."""

    loss: Tensor
    """What to run backward on: task_loss + weight * divergence, a differentiable scalar."""
    task_loss: Tensor
    """The model's own loss, detached, 0-dim."""
    divergence: Tensor
    """The reduced divergence before its weight, detached, 0-dim."""
    noise_to_signal: Tensor
    """||noised - clean|| / ||clean|| of the embedding output as handed on, detached, 0-dim."""
    changed: Tensor
    """Share of the embedding output's entries that the noise changed, detached, 0-dim."""
    logits: Tensor
    """Logits of the clean pass, detached."""


class TaskLoss:
    """Plain fine-tuning: the model's own loss from one pass."""

    def prepare_model(self, model: nn.Module) -> None:
        """Nothing to prepare: every model that returns a loss will do."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run one pass.

        Args:
            model: the model as returned by ``accelerator.prepare``.
            batch: keyword arguments of its forward, labels included.
        """
        output = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise NoiseError("The model returned no loss; expected one. Put labels into the batch.")
        nothing = loss.detach().new_zeros(())
        return ObjectiveOutput(loss, loss.detach(), nothing, nothing, nothing, output.logits.detach())


class R3F:
    """Noise stability: the task loss plus the symmetric KL between a clean and a noised pass.

    loss = L(x) + weight * J(f(x), f(x + z)),  z ~ U(-sigma, sigma) or N(0, sigma^2) on the encoder's token
    embeddings (Aghajanyan et al. 2021, eqs. 3-4). Two forward passes, so one ``backward`` on the one loss.

    Args:
        weight: the lambda of the paper.
        noise: distribution of the noise; the preset's (uniform) unless given.
        sigma: size of the noise; the preset's (1e-5) unless given. With preset="relative" a share of the
            embeddings' root mean square.
        preset: "paper" (default), "relative", "fairseq" or "rdrop", see ``swaft.noise.PRESETS``.
        masks: "shared" or "independent" dropout masks of the two passes.
        reduction: "mean" over counted rows, or "batchmean": sum over all rows by the number of sentences.
        detach: what the divergence holds constant: "none", "clean", "noised" or "target". With "noised" the
            noised pass runs without gradient.
        seed: seed of the noise.

    Raises:
        ConfigError: naming every invalid value.
    """

    def __init__(
        self,
        weight: float = 1.0,
        noise: Noise | None = None,
        sigma: float | None = None,
        *,
        preset: str | None = None,
        masks: Masks | None = None,
        reduction: Reduction | None = None,
        detach: Detach | None = None,
        seed: int = 0,
    ) -> None:
        if not is_finite_and_not_negative(weight):
            raise ConfigError(f"noise.weight is {weight!r}; expected a finite number, 0 or more.")
        explicit = {"noise": noise, "sigma": sigma, "masks": masks, "reduction": reduction, "detach": detach}
        self.weight = weight
        self.seed = seed
        self.step = 0
        """Micro-steps trained so far; with seed and rank it sets the noise. Set it when a run resumes."""
        self._classifying = resolve_settings(preset, generates=False, **explicit)
        self._generating = resolve_settings(preset, generates=True, **explicit)
        self._checked: WeakSet[nn.Module] = WeakSet()

    def prepare_model(self, model: nn.Module) -> None:
        """Check the model before training; call it before ``accelerator.prepare``.

        Raises:
            NoiseError: when the objective cannot be had with this model.
        """
        check_model(model, type(self).__name__)
        if self.settings_for(model).sigma > 0:
            find_site(model)

    def settings_for(self, model: nn.Module) -> NoiseSettings:
        """Pick the settings that apply to a model: presets may differ between classifying and generating."""
        return self._generating if generates(model) else self._classifying

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run both passes and combine them into one loss.

        The first call with a model proves, by two more passes without gradient, that the noise gets into the
        encoder; all ranks must make it.

        Args:
            model: the model as returned by ``accelerator.prepare``, in train or eval mode.
            batch: keyword arguments of its forward, labels included.

        Raises:
            NoiseError: when the noise does not reach the network, or the model does not fit the objective.
        """
        settings = self.settings_for(model)
        site = find_site(model) if settings.sigma > 0 else None
        self._check_once(model, batch, site, settings)

        rng = RngState.capture(model)
        clean = self._pass(model, batch, site, settings, noised=False)
        if settings.masks == "shared":
            rng.restore()
        with ExitStack() as second:
            second.enter_context(power_iteration_paused(model))
            if settings.detach == "noised" and not settings.ce_on_noised:
                second.enter_context(torch.no_grad())
            noised = self._pass(model, batch, site, settings, noised=True)
        if model.training and torch.is_grad_enabled():
            self.step += 1
        return self._combine(clean, noised, batch["labels"], settings)

    def _check_once(
        self, model: nn.Module, batch: dict[str, Any], site: EmbeddingSite | None, settings: NoiseSettings
    ) -> None:
        if model in self._checked:
            return
        check_model(model, type(self).__name__)
        if not isinstance(batch.get("labels"), Tensor):
            raise NoiseError(
                "The batch has no labels; expected a tensor of class indices under the key 'labels'."
            )
        if site is not None:
            prove_arrival(
                model, batch, site=site, draw=lambda clean: self._draw(clean, settings), settings=settings
            )
        self._checked.add(model)

    def _pass(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        site: EmbeddingSite | None,
        settings: NoiseSettings,
        *,
        noised: bool,
    ) -> _Pass:
        if site is None:
            output, embedded = model(**batch), None
        else:
            draw = (lambda clean: self._draw(clean, settings)) if noised else None
            with embedding_hook(site, draw, detach=noised and settings.detach_embedding) as embedded:
                output = model(**batch)
        check_output(output, batch["labels"], type(self).__name__)
        return _Pass(output.loss, output.logits, embedded)

    def _draw(self, clean: Tensor, settings: NoiseSettings) -> Tensor:
        sigma = settings.sigma * root_mean_square(clean).float() if settings.relative else settings.sigma
        return draw_noise(
            clean.shape,
            noise=settings.noise,
            sigma=sigma,
            device=clean.device,
            seed=self.seed,
            rank=current_rank(),
            step=self.step,
        )

    def _combine(
        self, clean: _Pass, noised: _Pass, labels: Tensor, settings: NoiseSettings
    ) -> ObjectiveOutput:
        rows = symmetric_kl(clean.logits, noised.logits, detach=settings.detach)
        divergence = settings.scale * reduce_rows(rows, labels, settings.reduction)
        task_loss = (clean.loss + noised.loss) / 2 if settings.ce_on_noised else clean.loss
        if noised.embedded is None:
            noise_to_signal = changed = divergence.detach().new_zeros(())
        else:
            realised = measure(noised.embedded)
            noise_to_signal, changed = realised.noise_to_signal, realised.changed
        return ObjectiveOutput(
            loss=task_loss + self.weight * divergence,
            task_loss=task_loss.detach(),
            divergence=divergence.detach(),
            noise_to_signal=noise_to_signal,
            changed=changed,
            logits=clean.logits.detach(),
        )


class R4F(R3F):
    """R3F with a spectrally normalised classification head, whose layers' Lipschitz constants are 1.

    Aghajanyan et al. 2021, eq. 5. ``prepare_model`` puts the normalisation on the model; the export of
    `swaft.averaging` writes the plain weights it evaluates to.

    Args:
        weight: as in R3F, like every other argument but ``layers``.
        noise: distribution of the noise.
        sigma: size of the noise.
        layers: "all" linear layers of the head (the paper), or the "last" (the released code).
        preset: see R3F.
        masks: see R3F.
        reduction: see R3F.
        detach: see R3F.
        seed: seed of the noise and of the power iterations' first vectors.
    """

    def __init__(
        self,
        weight: float = 1.0,
        noise: Noise | None = None,
        sigma: float | None = None,
        *,
        layers: Layers = "all",
        preset: str | None = None,
        masks: Masks | None = None,
        reduction: Reduction | None = None,
        detach: Detach | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            weight, noise, sigma, preset=preset, masks=masks, reduction=reduction, detach=detach, seed=seed
        )
        if layers not in get_args(Layers):
            raise ConfigError(f"noise.layers is {layers!r}; expected one of {', '.join(get_args(Layers))}.")
        self.layers: Layers = layers

    def prepare_model(self, model: nn.Module) -> None:
        """Check the model and normalise its head in place; call it before ``accelerator.prepare``.

        Raises:
            NoiseError: when the objective cannot be had with this model.
            ConfigError: when the model has no classification head of its own.
        """
        super().prepare_model(model)
        normalise_head(model, layers=self.layers, seed=self.seed)

    def _check_once(
        self, model: nn.Module, batch: dict[str, Any], site: EmbeddingSite | None, settings: NoiseSettings
    ) -> None:
        if model not in self._checked and not normalised_layers(model):
            raise NoiseError(
                "R4F found no spectrally normalised layer in the model; expected its head to be. "
                "Call objective.prepare_model(model) before accelerator.prepare."
            )
        super()._check_once(model, batch, site, settings)


class RDrop(R3F):
    """Two passes that differ in their dropout masks only, the task loss averaged over both.

    loss = (L_1 + L_2) / 2 + weight * (KL(p||q) + KL(q||p)) / 2  (Liang et al. 2021, eqs. 2-4);
    ``divergence`` is the halved sum.

    Args:
        weight: the alpha of the paper.
        seed: taken for the sake of a common signature; nothing is drawn from it.
    """

    def __init__(self, weight: float = 1.0, *, seed: int = 0) -> None:
        super().__init__(weight, preset="rdrop", seed=seed)


class _Pass(NamedTuple):
    """One forward pass: its loss, its logits, and what its embedding handed on."""

    loss: Tensor
    logits: Tensor
    embedded: Embedded | None


def reduce_rows(rows: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    """One divergence from those of all rows.

    Args:
        rows: divergence of each row, (B,) or (B, T).
        labels: class indices, same shape; IGNORE_INDEX where a row does not count.
        reduction: "mean" over counted rows (0 where there are none), or "batchmean": sum over all rows,
            counted or not, divided by B.

    Returns:
        A 0-dim tensor.
    """
    if reduction == "batchmean":
        return rows.sum() / rows.shape[0]
    counted = labels != IGNORE_INDEX
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp(min=1)
