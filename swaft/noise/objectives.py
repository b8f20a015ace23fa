"""The objectives that train a model: plain fine-tuning, R3F, R4F and R-Drop, all called the same way."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from swaft.distributed import current_rank
from swaft.errors import NoiseError, StateError
from swaft.noise.checks import (
    check_model,
    check_one_mask,
    check_seeds,
    check_two_masks,
    check_uncompiled,
    generates,
    layers,
    predicts_tokens,
    unwrap,
)
from swaft.noise.embedding import Disturbance, EmbeddingSite, find_site
from swaft.noise.generator import Noise, add_noise
from swaft.noise.head import LanguageModelHead, find_head
from swaft.noise.inputs import (
    as_arguments,
    count_averaged,
    count_items,
    mean_cross_entropy,
    part,
    prepare_inputs,
    real_tokens,
    task_logits,
    without_cache,
)
from swaft.noise.loss import Detach
from swaft.noise.passes import choose_form, run_passes
from swaft.noise.presets import (
    PRESETS,
    Masks,
    NoiseSettings,
    Passes,
    Preset,
    Reduction,
    resolve_settings,
)
from swaft.noise.proof import FirstBatches, prove
from swaft.noise.spectral import Layers, normalise_head, normalised_layers
from swaft.options import NotNegative, ShareBelowOne, require

ONE_PASS, TWO_PASSES, WITH_NOISE = ("loss",), ("task_loss", "divergence"), ("noise_to_signal", "changed")
"""What each kind of step adds to a log."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of one micro-step and its parts."""

    loss: Tensor
    """The loss for ``backward``: task_loss + weight * divergence, a differentiable scalar."""
    task_loss: Tensor
    """The loss of the task alone, detached, 0-dim."""
    divergence: Tensor
    """The reduced divergence before its weight, detached, 0-dim."""
    noise_to_signal: Tensor
    """||noised - clean|| / ||clean|| of the embedding output as passed on, over non-padding tokens, detached,
    0-dim."""
    changed: Tensor
    """Share of the same tokens' entries that the noise changed, detached, 0-dim."""
    num_items: Tensor
    """Number of rows the loss is averaged over (texts, ends of answers, target tokens), 0-dim int64: the weight of
    this micro-batch in gradient accumulation."""
    logits: Tensor | None
    """Logits of the clean pass, detached; (B, 2, L) for first and last tokens; None if none were computed, and from
    `TaskLoss` for a model that predicts tokens."""
    measured: tuple[str, ...] = ONE_PASS + TWO_PASSES + WITH_NOISE
    """Names of the numbers that this step measured. Others say nothing new: with one pass the task loss is the loss
    and the divergence 0, and without noise ``noise_to_signal`` and ``changed`` are 0."""

    @property
    def logged(self) -> dict[str, Tensor]:
        """The numbers that belong in a log, by name: those that were measured."""
        return {name: getattr(self, name).detach() for name in self.measured}


class Proved(WeakSet[nn.Module]):
    """Models on which an objective has made its proof, with what they wrap: one rank may evaluate that alone.

    A copy, in another process say, has none of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Resumable:
    """The state of an objective that a resumed run needs, for ``accelerator.register_for_checkpointing``."""

    step: int = 0
    """Micro-steps trained so far; together with seed and rank it determines the noise. `TaskLoss` leaves it at
    0."""

    def finish(self) -> None:
        """Call at the end of training: after a short run this warns if its divergence had no effect."""

    def state_dict(self) -> dict[str, int]:
        """Return the state, which is the same on every rank."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a state.

        Raises:
            StateError: this is not the state of an objective.
        """
        step = state.get("step") if set(state) == {"step"} else None
        if not isinstance(step, int) or step < 0:
            raise StateError(f"An objective's state is {state}; expected {{'step': n}}, n 0 or more.")
        self.step = step


@dataclass(eq=False)
class TaskLoss(Resumable):
    """Plain fine-tuning: the model's own loss from one pass, or the same with label smoothing.

    With smoothing, the loss is the mean cross entropy of the counted rows, computed here. A model that trains
    another loss is refused on the first batch, which is run once more without gradients.

    Raises:
        ConfigError: the share is out of range.
    """

    label_smoothing: ShareBelowOne = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        require(self)
        self._proved = Proved()

    def prepare_model(self, model: nn.Module) -> None:
        """Nothing to prepare: the model's own loss is checked on the first batch."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run one pass.

        Args:
            model: the model as returned by ``accelerator.prepare``.
            batch: keyword arguments of its forward, including labels.

        Raises:
            NoiseError: the batch has no labels, or (with smoothing) the model's own loss is not the mean cross
                entropy.
        """
        loss_of = self._smoothed if self.label_smoothing else self._own
        loss, logits, num_items = loss_of(model, as_arguments(batch))
        nothing = loss.detach().new_zeros(())
        return ObjectiveOutput(
            loss=loss,
            task_loss=loss.detach(),
            divergence=nothing,
            noise_to_signal=nothing,
            changed=nothing,
            num_items=num_items,
            # Those of a text fill gigabytes, which would stay with the output until after the next forward pass.
            logits=None if logits is None or predicts_tokens(model) else logits.detach(),
            measured=ONE_PASS,
        )

    def _own(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        output = model(**without_cache(model, batch))
        loss = part(output, "loss")
        if loss is None:
            raise NoiseError(
                f"The model's output, {type(output).__name__}, has no loss; expected .loss or ['loss']. Put labels "
                "into the batch, and have the model return its loss by name (return_dict=True)."
            )
        num_items = count_averaged(model, batch).to(loss.device, non_blocking=True)
        # The mean over no rows is NaN, but 0 in R3F.
        return loss.masked_fill(num_items == 0, 0.0), task_logits(output), num_items

    def _smoothed(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        inputs = prepare_inputs(model, batch)
        if model not in self._proved:
            of_proof = PRESETS["rdrop"][0]  # no noise, and no masks to share between passes
            if prove(model, batch, Disturbance(None, of_proof, "label smoothing"), head=None):
                self._proved.update(layers(model))
        logits = task_logits(model(**inputs.arguments))
        loss = mean_cross_entropy(logits.float(), inputs, label_smoothing=self.label_smoothing)
        num_items = count_items(inputs.targets)
        return loss.masked_fill(num_items == 0, 0.0), logits, num_items


@dataclass(eq=False)
class TwoPasses(Resumable):
    """A task loss and a divergence between two passes of one batch: what R3F, R4F and R-Drop have in common.

    If ``weight * divergence`` stays below one thousandth of the task loss, a warning during the first batches says
    what to set: such a second pass costs time and trains nothing.

    Raises:
        ConfigError: names every invalid value.
    """

    weight: NotNegative = 1.0
    """Factor on the divergence: lambda in the R3F paper, alpha in the R-Drop paper."""
    _: KW_ONLY
    preset: Preset | None = None
    """Published variant to follow, see ``swaft.noise.PRESETS``; None: "paper", for R-Drop "rdrop"."""
    passes: Passes = "two"
    """"two": one after the other; "doubled": one pass over the batch concatenated with itself, which is faster for
    small batches. Its dropout masks are independent, so masks="shared" then needs a model without dropout."""
    fused: bool = True
    """Compute the loss of a model that predicts tokens (one that generates text, a masked language model) from its
    hidden states, chunk by chunk, so that its full logits are never stored. False: from the logits of both passes,
    which takes more memory."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the task loss's target that is spread over all classes."""
    seed: int = 0
    """Seed of the noise."""

    _OPTIONS: ClassVar = ("passes", "fused", "label_smoothing")
    _PRESET: ClassVar[Preset] = "paper"

    def __post_init__(self) -> None:
        require(self)
        options = {name: getattr(self, name) for name in self._OPTIONS}
        preset = self.preset or self._PRESET
        self._classifying = resolve_settings(preset, generates=False, **options)
        self._generating = resolve_settings(preset, generates=True, **options)
        self._proved = Proved()
        self._first_batches = FirstBatches()

    def prepare_model(self, model: nn.Module) -> None:
        """Check the model before training; call it before ``accelerator.prepare``.

        Raises:
            NoiseError: this model cannot be trained with the objective.
        """
        check_model(model, type(self).__name__)
        settings, *_ = self._fitted(model)
        self._check_masks(model, settings)

    def settings_for(self, model: nn.Module) -> NoiseSettings:
        """The settings that apply to a model: presets may differ between classification and generation."""
        return self._generating if generates(model) else self._classifying

    # In a compiled training step: each pass replaces parts of the model anew.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run the clean and the noised pass and combine them into one loss.

        The first call with a model proves, with one or two extra passes without gradients, that the model's own
        loss is the one computed here, that its head is understood, and that the noise reaches the network. All
        ranks must make this call; later, one may evaluate the model inside its wrappers alone.

        Args:
            model: the model as returned by ``accelerator.prepare``. A call with gradients is a step of training.
            batch: keyword arguments of its forward, including labels.

        Raises:
            NoiseError: the noise does not reach the network, or the model does not fit the objective; or the passes
                of a step would be equal, because only dropout makes them differ and the model is in eval mode.
        """
        name = type(self).__name__
        if model not in self._proved:  # the model may have changed since prepare_model
            check_model(model, name)
        batch = as_arguments(batch)
        inputs = prepare_inputs(model, batch)
        settings, site, head = self._fitted(model)
        if unwrap(model).training:  # a wrapper has a flag of its own
            self._check_masks(model, settings)
        elif settings.sigma == 0 and torch.is_grad_enabled():
            raise NoiseError(
                f"{name} without noise compares two passes that differ only in their dropout masks, and the model "
                "is in evaluation mode, as from_pretrained returns it; expected training mode: call model.train()"
            )
        noise = Disturbance(site, settings, name, self._draw, real_tokens(inputs.arguments))
        if model not in self._proved and prove(model, batch, noise, head=head):
            self._proved.update(layers(model))

        form = choose_form(inputs, settings, weight=self.weight, head=head, objective=name)
        loss, logits, embedded = run_passes(model, form, noise)
        divergence = settings.scale * loss.divergence
        nothing = torch.zeros_like(divergence)
        out = ObjectiveOutput(
            loss=settings.task_scale * loss.loss,
            task_loss=settings.task_scale * loss.task_loss,
            divergence=divergence,
            noise_to_signal=embedded.noise_to_signal(noise.real) if embedded else nothing,
            changed=embedded.changed(noise.real) if embedded else nothing,
            num_items=count_items(inputs.targets),
            logits=logits,
            measured=ONE_PASS + TWO_PASSES + (WITH_NOISE if embedded else ()),
        )
        if torch.is_grad_enabled():
            self.step += 1
            if self.weight > 0:
                self._first_batches.add(out.task_loss, self.weight * out.divergence, settings, name)
        return out

    def finish(self) -> None:
        """Warn at the end of a short training if the divergence had no effect; a long one was warned before."""
        self._first_batches.finish()

    def _draw(self, embedding: Tensor, **how: Any) -> Tensor:
        return add_noise(embedding, **how, seed=self.seed, rank=current_rank(), step=self.step)

    def _check_masks(self, model: nn.Module, settings: NoiseSettings) -> None:
        if settings.masks == "shared":
            check_seeds(model)
            if settings.passes == "doubled":
                check_one_mask(model)
        if settings.sigma == 0:
            check_two_masks(model, type(self).__name__)

    def _fitted(
        self, model: nn.Module
    ) -> tuple[NoiseSettings, EmbeddingSite | None, LanguageModelHead | None]:
        """The settings for a model, where its noise goes in, and the head that computes its loss, if any."""
        settings = self.settings_for(model)
        site = find_site(model) if settings.sigma > 0 else None
        if site:
            check_uncompiled(model, type(self).__name__)
        return settings, site, find_head(model) if settings.fused and predicts_tokens(model) else None


@dataclass(eq=False)
class R3F(TwoPasses):
    """Noise stability: the task loss plus the symmetric KL between a clean and a noised pass.

    loss = L(x) + weight * J(f(x), f(x + z)),  z ~ U(-sigma, sigma) or N(0, sigma^2) on the token embeddings of
    the encoder, or of a causal model (Aghajanyan et al. 2021, eqs. 3-4). L is the mean cross entropy of the counted
    rows; a model that trains another loss is refused. An extractive question-answering model has two rows per text,
    one for the first and one for the last token of the answer, and L is the mean of their two means. There is one
    loss, and one ``backward``.
    """

    noise: Noise | None = None
    """Distribution of the noise; None: the preset's, which is uniform except for "fairseq" with generated text."""
    sigma: NotNegative | None = None
    """Half width or standard deviation of the noise; None: the preset's (1e-5; 1 for "relative"). With
    preset="relative", a share of the root mean square of the embeddings of non-padding tokens; with "fairseq",
    before the factor of embeddings that scale their output."""
    _: KW_ONLY
    masks: Masks | None = None
    """Dropout masks of the two passes."""
    reduction: Reduction | None = None
    """"mean": over the rows whose label counts; "batchmean": sum over all rows, including padding, divided by the
    number of sentences."""
    detach: Detach | None = None
    """What the divergence treats as constant in its gradient; with "noised", the noised pass runs first, without
    gradients."""

    _OPTIONS: ClassVar = (*TwoPasses._OPTIONS, "noise", "sigma", "masks", "reduction", "detach")


@dataclass(eq=False)
class R4F(R3F):
    """R3F with a spectrally normalised classification head, so that its layers have Lipschitz constant 1.

    Aghajanyan et al. 2021, eq. 5. ``prepare_model`` adds the normalisation to the model, with initial vectors drawn
    from ``seed``. While it is there, the model's own ``save_pretrained`` writes the head under names that
    ``from_pretrained`` does not find; docs/methods.md shows how to end it. The exports of `swaft.averaging` write
    the plain weights it evaluates to.
    """

    _: KW_ONLY
    layers: Layers = "all"
    """Which linear layers of the head: "all" (the paper), or only the "last" (the released code)."""

    def prepare_model(self, model: nn.Module) -> None:
        """Check the model and normalise its head in place; call it before ``accelerator.prepare``.

        Raises:
            NoiseError: this model cannot be trained with the objective.
            ConfigError: the model has no classification head of its own.
        """
        super().prepare_model(model)
        normalise_head(model, layers=self.layers, seed=self.seed)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> ObjectiveOutput:
        """Run both passes as R3F does.

        Raises:
            NoiseError: as R3F, or the model was not prepared.
        """
        if model not in self._proved and not normalised_layers(model):
            raise NoiseError(
                "R4F found no spectrally normalised layer in the model; expected its head to be normalised. "
                "Call objective.prepare_model(model) before accelerator.prepare."
            )
        return super().__call__(model, batch)


@dataclass(eq=False)
class RDrop(TwoPasses):
    """Two passes that differ only in their dropout masks, with the cross entropy taken over both (Liang et al.
    2021).

    ``divergence`` is (KL(p||q) + KL(q||p)) / 2, and ``weight`` is alpha in the form that ``preset`` names:

    "rdrop", the example of their README:             loss = (L_1 + L_2) / 2 + weight * divergence
    "rdrop_paper", equation 4 and their fairseq code: loss =  L_1 + L_2      + weight * divergence

    The same number weighs the divergence twice as much in the former: 1 there is 2 in the equation. ``seed`` is not
    used. The paper's own code doubles the batch (``passes``).
    """

    _: KW_ONLY
    preset: Literal["rdrop", "rdrop_paper"] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which form; None: "rdrop"."""

    _PRESET: ClassVar[Preset] = "rdrop"
