"""R4F: spectral normalisation of the classification head, and folding it into plain weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from swaft.errors import ConfigError
from swaft.noise.checks import predicts_tokens, unwrap
from swaft.noise.generator import stream_seed
from swaft.noise.loss.options import wide_dtype

Layers = Literal["all", "last"]

_INITIAL_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """Divide a weight by its largest singular value, found by power iteration (Miyato et al. 2018).

    Values and state-dict names are those of ``torch.nn.utils.parametrizations.spectral_norm``. Two things differ.
    The initial vectors come from a separate generator, so all ranks start with the same ones and torch's random
    state is not touched. And sigma is not rounded to 16 bits, neither by autocast nor under DeepSpeed, which casts
    the weight and leaves the vectors in fp32 (torch's version refuses that). So what is exported is what was
    trained.

    Args:
        weight: the weight (out, in) to normalise.
        seed: seed of the initial vectors.
    """

    def __init__(self, weight: Tensor, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(stream_seed(seed, *weight.shape))
        u, v = (
            F.normalize(torch.randn(n, generator=generator, device="cpu"), dim=0).to(weight)
            for n in weight.shape
        )
        self._u, self._v = nn.Buffer(u), nn.Buffer(v)
        self._iterate(weight, _INITIAL_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """Divide the weight by its spectral norm; in training mode, after one power iteration."""
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self._iterate(weight, 1)
            # The next iteration writes in place, and the backward of this pass still needs these values.
            return normalised_weight(weight, self._u.clone(), self._v.clone())

    @torch.no_grad()
    def _iterate(self, weight: Tensor, times: int) -> None:
        wide = weight.to(wide_dtype(weight))
        for _ in range(times):
            self._u.copy_(F.normalize(torch.mv(wide, self._v.to(wide.dtype)), dim=0))
            self._v.copy_(F.normalize(torch.mv(wide.mT, self._u.to(wide.dtype)), dim=0))


def normalised_weight(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W / (u^T W v), computed in at least fp32 and returned in the weight's dtype."""
    wide = weight.to(wide_dtype(weight))
    sigma = torch.vdot(u.to(wide.dtype), torch.mv(wide, v.to(wide.dtype)))
    return (wide / sigma).to(weight.dtype)


def normalise_head(model: nn.Module, *, layers: Layers = "all", seed: int = 0) -> list[str]:
    """Add spectral normalisation to the linear layers of a model's classification head, in place.

    The head is everything outside the base model. BERT's pooler belongs to the base model, so it is not part of the
    head; RoBERTa's and BART's dense layer is. A layer that is already normalised is left alone.

    Args:
        model: a Hugging Face classification model, before the training engine wraps it.
        layers: "all" linear layers (the paper: all weight matrices of the head), or only the "last" (the released
            code).
        seed: seed of the power iterations' initial vectors, the same on every rank.

    Returns:
        The names of the normalised layers.

    Raises:
        ConfigError: the model has no head of its own, or ZeRO-3 has already partitioned it.
    """
    head = _head(model)
    for name, linear in head[-1:] if layers == "last" else head:
        if parametrize.is_parametrized(linear, "weight"):
            continue
        if linear.weight.numel() == 0:
            raise ConfigError(
                f"R4F: ZeRO-3 has already partitioned {name}; expected the whole weight. "
                "Set zero3_init_flag: false in the accelerate config."
            )
        parametrize.register_parametrization(
            linear, "weight", SpectralNorm(linear.weight.detach(), seed=seed)
        )
    return normalised_layers(model)


def normalised_layers(model: nn.Module) -> list[str]:
    """The names of the layers whose weight is spectrally normalised."""
    return [
        name
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear)
        and any(isinstance(child, SpectralNorm) for child in module.modules())
    ]


@contextmanager
def power_iteration_paused(model: nn.Module) -> Iterator[None]:
    """Keep the vectors fixed inside: one power iteration per step, although the step has two passes."""
    norms = [module for module in model.modules() if isinstance(module, SpectralNorm)]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)


def _head(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    network = unwrap(model)
    base = getattr(network, "base_model", network)
    inside = {id(module) for module in base.modules()}
    head = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    ]
    if predicts_tokens(network) or not head:
        raise ConfigError(
            f"R4F: {type(network).__name__} has no classification head with weights of its own; "
            "expected one to normalise. Use swaft.R3F (noise.kind=r3f)."
        )
    return head
