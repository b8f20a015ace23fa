"""What is proved once, before training: that the loss is the model's own, and that the noise reaches the model.

Also what is checked during the first batches: whether the noise has an effect on the loss.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.distributed import current_rank, is_distributed
from swaft.errors import NoiseError
from swaft.noise.checks import check_not_recomputed, check_rows, check_seeds, predicts_tokens, router_terms
from swaft.noise.embedding import (
    Disturbance,
    Embedded,
    EmbeddingSite,
    embedding_hook,
    noise_to_signal,
    root_mean_square,
)
from swaft.noise.generator import Noise
from swaft.noise.head import LanguageModelHead, placeholder
from swaft.noise.inputs import (
    IGNORE_INDEX,
    mean_cross_entropy,
    part,
    prepare_inputs,
    proof_rows,
    real_tokens,
    task_logits,
    without_cache,
)
from swaft.noise.loss.options import wide_dtype
from swaft.noise.passes import random_state_kept
from swaft.noise.presets import NoiseSettings

logger = logging.getLogger(__name__)

_ROWS = 2
"""Rows of a batch used to prove a model that predicts tokens: its logits are too large for all rows."""

_ROUTER_LOSSES = ("aux_loss", "z_loss")
"""Suffixes of a mixture of experts' own losses in the output of a Hugging Face model."""

_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 2e-2
"""Allowed relative difference of two computations of one number; the second if the model rounds to 16 bits."""

_CHANGES_HALF = {"uniform": 1.0, "normal": 0.5 / 0.6745}
"""Sigma, in units in the last place of an entry, at which adding noise changes it with probability 1/2."""


_LOOKS = {8: 1e-9, 128: 1e-3}
"""When to check the divergence, in batches of a run, and the share of the task loss from which it has an effect.

The share grows while a new head learns. At a relative sigma of 0.5 it grew from 4e-6 to 2e-2 on the quick start,
and from 2e-8 to 6e-2 on two layers of its model. So the first check only finds what will never have an effect.
"""

_AVERAGED = 8
"""Number of batches that a check averages."""

_FELT_SIGMA = 0.5
"""The relative sigma from which noise had an effect (divergence 2e-2 on the trained model of the quick start)."""


def prove(
    model: nn.Module, batch: dict[str, Any], noise: Disturbance, *, head: LanguageModelHead | None
) -> bool:
    """Check that the model's own loss, its logits and its first layer are what the objective assumes.

    This takes one clean pass with labels and, if there is noise, one noised pass with the same dropout masks. Both
    run without gradients, on one or two rows if the model predicts tokens. Every rank must run them. Random state,
    buffers and the training mode are left unchanged.

    Args:
        model: the model as wrapped by the training engine.
        batch: keyword arguments of its forward, including labels.
        noise: of the step, with the objective's settings.
        head: the head of the fused loss; None if the loss is computed from logits.

    Returns:
        Whether the loss could be compared: False if no rank's batch has rows of more than one class, since class
        weights show only in the mean cross entropy over several classes.

    Raises:
        NoiseError: the model trains another loss than the mean cross entropy, its logits are not what the head is
            assumed to compute, or the noise does not arrive; on all ranks.
    """
    rows = proof_rows(model, batch, at_most=_ROWS) if predicts_tokens(model) else batch
    inputs = prepare_inputs(model, rows)
    noise = replace(noise, real=real_tokens(inputs.arguments))
    site, settings, objective = noise.site, noise.settings, noise.objective
    for changed in filter(None, (site and site.embedding, head and head.linear)):
        check_not_recomputed(model, changed, objective)
    with torch.no_grad(), _buffers_restored(model):
        with random_state_kept(model, batch):
            seed = torch.initial_seed()
            with layer_inputs(site) if site else nullcontext([]) as clean:
                loss_figures = _clean_pass(model, rows, noise, head)
            if settings.masks == "shared":
                check_seeds(model, reseeded=torch.initial_seed() != seed)
        arrival, handed_on = torch.zeros(4, device=loss_figures.device), torch.float32
        if site is not None:
            with (
                random_state_kept(model, batch),
                layer_inputs(site) as noisy,
                embedding_hook(site, noise) as noised,
                head.replaced(placeholder) if head else nullcontext(),
            ):
                model(**inputs.arguments)
            arrival = measure_arrival(noised, clean, noisy, noise)
            handed_on = noised.handed_on.dtype
        # Weights that autocast has cast here have no gradient and must not be reused in the training pass.
        torch.clear_autocast_cache()

    figures = torch.cat([loss_figures, arrival])
    if is_distributed():  # so that either all ranks continue or none
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    compared, loss_gap, logits_gap, *arrived = figures.tolist()
    if loss_gap > 1:
        raise NoiseError(
            f"{objective} computes the mean cross entropy of the counted rows, and the model's own loss is "
            "another one (weighted, smoothed, with more terms, or of other rows), which would be replaced. "
            "Expected a model whose loss is the mean cross entropy. Use swaft.TaskLoss without label smoothing "
            "(noise.kind=none)."
        )
    if head is not None and logits_gap > 1:
        raise NoiseError(
            f"The model does more to its logits after the head than is known (logit scale {head.logit_scale:g}, "
            f"soft-cap {head.softcap}, {'no' if head.logits_bias is None else 'a'} bias); expected nothing more. "
            "Set fused=False, which computes the loss from the logits of both passes."
        )
    if site is not None:
        judge_arrival(ArrivalFigures(*arrived), noise, handed_on)
    return compared > 0


def _clean_pass(
    model: nn.Module, rows: dict[str, Any], noise: Disturbance, head: LanguageModelHead | None
) -> Tensor:
    """Run the model with labels, its own head and its own loss.

    Returns:
        (3,) fp32: 1 if the loss can be compared; then the differences of the loss and of the logits from their
        expected values, as multiples of the tolerance.
    """
    outputs: list[Tensor] = []

    def watched(hidden: Tensor) -> Tensor:
        assert head is not None
        head.loss_arguments()  # raises for a weight that the fused loss cannot take
        outputs.append(nn.Linear.forward(head.linear, hidden))
        return outputs[-1]

    with (
        embedding_hook(noise.site) if noise.site else nullcontext(),
        head.replaced(watched) if head else nullcontext(),
    ):
        output = model(**without_cache(model, rows))
    _check_output(output, noise.objective)
    inputs, logits = prepare_inputs(model, rows), task_logits(output)
    targets = inputs.targets
    check_rows(logits, targets, noise.objective)

    dtypes = {parameter.dtype for parameter in model.parameters()} | {each.dtype for each in outputs}
    rounds = any(dtype.itemsize < 4 for dtype in dtypes if dtype.is_floating_point)
    tolerance = _TOLERANCE_16_BIT if rounds else _TOLERANCE
    logits = logits.to(wide_dtype(logits))
    expected = mean_cross_entropy(logits, inputs)
    loss_gap = (part(output, "loss") - expected).abs() / (1 + expected.abs())
    logits_gap = torch.zeros_like(loss_gap)
    if head is not None:
        transformed = head.transform(outputs[-1])
        if transformed.shape == logits.shape:
            logits_gap = (logits - transformed).abs().amax() / transformed.abs().amax()
        else:  # a layer before the head (some DeBERTa)
            logits_gap = torch.full_like(loss_gap, torch.inf)
    counted = targets[targets != IGNORE_INDEX]
    # Class weights cancel in the mean if there is only one class; a batch of one row cannot have more.
    compared = (counted != counted[:1]).any() | (targets.numel() == 1)
    # NaN losses or logits are left for the training loop to find; the loss is NaN too if no row counts.
    gaps = torch.stack([loss_gap, logits_gap]).nan_to_num(nan=0.0) / tolerance
    return torch.cat([compared.float().reshape(1), gaps.float()])


def _check_output(output: Any, objective: str) -> None:
    """Refuse an output without loss or logits, or whose loss has terms of a mixture of experts."""
    if not isinstance(task_logits(output), Tensor) or part(output, "loss") is None:
        raise NoiseError(
            f"The model's output, {type(output).__name__}, lacks .loss or .logits (or the same as keys), which "
            f"{objective} needs; expected a Hugging Face model that classifies, points at answers or generates and "
            "returns both by name (return_dict=True). Or use swaft.TaskLoss (noise.kind=none), "
            "which needs only the loss."
        )
    # Such a term may be too small compared to the cross entropy to show in the loss.
    names = dict.fromkeys(dir(output))
    if isinstance(output, Mapping):
        names |= dict.fromkeys(output)
    terms = [name for name in names if name.endswith(_ROUTER_LOSSES) and part(output, name) is not None]
    if terms:
        raise router_terms(", ".join(terms), objective)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Undo changes that forward passes make to buffers (running statistics, vectors of a power iteration).

    Autograd is not told: a pass before this one may wait for its backward, for which it has kept buffers.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)


class ArrivalFigures(NamedTuple):
    """How much of the noise arrived."""

    at_embedding: float
    """Noise-to-signal ratio of the embedding output as passed on."""
    changed: float
    """Share of its entries that changed."""
    at_layer: float
    """Noise-to-signal ratio of the first layer's input."""
    smallest_sigma: float
    """The sigma at which half of the entries would change, absolute or relative, as in the settings."""


def measure_arrival(noised: Embedded, clean: list[Tensor], noisy: list[Tensor], noise: Disturbance) -> Tensor:
    """Compare the inputs of the first layers in a clean and a noised pass with the same dropout masks.

    Args:
        noised: record of the noised pass.
        clean: the first layers' inputs in the clean pass, from `layer_inputs`.
        noisy: the same in the noised pass.
        noise: of the noised pass.

    Returns:
        The ArrivalFigures (4,), fp32, on the model's device.
    """
    smallest = smallest_surviving_sigma(noised, noise.settings.noise)
    if noise.settings.relative:
        smallest = smallest / root_mean_square(noised.clean, noise.real)
    arrived = torch.stack([noise_to_signal(*pair) for pair in zip(clean, noisy, strict=True)])
    first = arrived[(arrived > 0).int().argmax()]  # of the stacks that the noise reaches
    at_embedding, changed = noised.noise_to_signal(noise.real), noised.changed(noise.real)
    return torch.stack([at_embedding, changed, first, smallest.float()])


def judge_arrival(figures: ArrivalFigures, noise: Disturbance, dtype: torch.dtype) -> None:
    """Log how much of the noise survives, at INFO, or refuse to train if none does.

    Args:
        figures: the largest over all ranks.
        noise: of the noised pass.
        dtype: of the embedding output as passed on.

    Raises:
        NoiseError: the noise is lost in rounding, or never enters the network.
    """
    site, settings = noise.site, noise.settings
    assert site is not None
    smallest = figures.smallest_sigma / (site.scale if settings.before_scale else 1.0)
    if figures.changed == 0 or figures.at_layer == 0:
        first_layer = f"first layer of {type(site.encoder).__name__}"
        place = "embedding output" if figures.changed == 0 else first_layer
        raise NoiseError(
            f"Noise of sigma {settings.sigma:g} changes nothing in the {place} ({dtype}): it is lost in "
            "rounding, or the encoder ignores its embedding output. Expected a change. Half of the entries "
            f"change from about sigma={smallest:.1e}: set that or more, use a wider dtype, or use "
            "swaft.TaskLoss (noise.kind=none)."
        )
    if current_rank() == 0:
        logger.info(
            "%s noise, sigma %g: noise-to-signal %.2e at the embedding (%.1f%% of entries changed, handed "
            "on in %s), %.2e at the first encoder layer; the smallest sigma that survives is about %.1e",
            *(settings.noise, settings.sigma, figures.at_embedding, 100 * figures.changed, dtype),
            *(figures.at_layer, smallest),
        )


class FirstBatches:
    """What the divergence adds to the loss of a run's first batches; warns once if it has no effect.

    Numbers stay on the device, which is read once per check.
    """

    def __init__(self) -> None:
        self._batches, self._recent = 0, deque[Tensor](maxlen=_AVERAGED)
        self._looks = dict(_LOOKS)

    def add(self, task_loss: Tensor, weighted: Tensor, settings: NoiseSettings, objective: str) -> None:
        """Add a training batch; if a check is due and the divergence has no effect, warn.

        Args:
            task_loss: of the batch, 0-dim, detached.
            weighted: weight * divergence, 0-dim, detached.
            settings: of the objective.
            objective: its name.
        """
        if not self._looks:
            return
        self._batches, self._of = self._batches + 1, (settings, objective)
        self._recent.append(torch.stack([task_loss, weighted]))
        if self._batches in self._looks:
            self._check(self._looks.pop(self._batches))

    def finish(self) -> None:
        """Do the last check now, if a run ends before it is due, though not long before."""
        if self._looks and 2 * self._batches >= max(self._looks):
            self._check(self._looks.popitem()[1])

    def _check(self, felt: float) -> None:
        settings, objective = self._of
        task, added = torch.stack([*self._recent]).mean(0).tolist()
        if not added < felt * task:  # also if NaN
            return
        self._looks.clear()
        if current_rank() == 0:
            logger.warning(
                "%s has no effect: after %d batches weight x divergence is %.1e next to a task loss of %.2g%s. "
                "Below one thousandth of it, training is the same as without noise, at twice the cost. Set %s",
                *(objective, self._batches, added, task),
                "; the two passes are the same" if added == 0 else "",
                _felt_settings(settings),
            )


def _felt_settings(settings: NoiseSettings) -> str:
    if settings.masks == "shared":
        ways = ["masks='independent' (dropout then differs between the passes)"]
    else:
        ways = ["more dropout in the model"]
    if settings.sigma > 0:
        sigma = 2 * settings.sigma if settings.relative and settings.sigma >= _FELT_SIGMA else _FELT_SIGMA
        ways.append(f"preset='relative' with sigma={sigma:g} or more")
    return ", ".join([*ways, "or a larger weight."])


def smallest_surviving_sigma(record: Embedded, noise: Noise) -> Tensor:
    """Estimate the sigma at which half of an embedding output's entries change in the dtype passed on.

    An entry changes when the noise exceeds half its unit in the last place, eps * 2**floor(log2 |x|). For uniform
    noise this has probability 1/2 at sigma = one unit, for normal noise at 0.74 units; the estimate takes the
    median entry. Entries that are 0 (padding) are left out.

    Returns:
        A 0-dim tensor; 0 when every entry is 0.
    """
    exponents = record.clean[record.clean != 0].abs().float().log2().floor()
    if exponents.numel() == 0:
        return record.clean.new_zeros(())
    ulp = torch.finfo(record.handed_on.dtype).eps * torch.exp2(exponents)
    return ulp.median() * _CHANGES_HALF[noise]


@contextmanager
def layer_inputs(site: EmbeddingSite) -> Iterator[list[Tensor]]:
    """Record the input of the first layer that runs in each stack of an encoder during a pass.

    Yields:
        A list that holds these inputs, in the order in which the stacks run, once the pass has run. The first stack
        need not be the one that processes text: embeddings may be made of several tables (MarkupLM).
    """
    seen: dict[nn.ModuleList, Tensor] = {}

    def catch(stack: nn.ModuleList) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if stack not in seen and tensors:
                seen[stack] = tensors[0].detach().clone()

        return hook

    # Some models bypass a layer's hooks (SqueezeBERT), so its submodules are watched as well.
    handles = [
        module.register_forward_pre_hook(catch(stack), with_kwargs=True)
        for stack in _stacks(site.encoder)
        for layer in stack
        for module in layer.modules()
    ]
    inputs: list[Tensor] = []
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    inputs += seen.values()
    if not inputs:
        raise NoiseError(
            f"No layer of {type(site.encoder).__name__} ran in a forward pass; expected a torch.nn.ModuleList of "
            "layers, so that the noise can be followed there. Use swaft.RDrop or swaft.TaskLoss "
            "(noise.kind=rdrop or none)."
        )


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The module lists that are not inside another one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)
