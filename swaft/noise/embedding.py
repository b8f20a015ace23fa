"""Noise on the output of the encoder's token embedding, added by a forward hook that must fire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.checks import unwrap
from swaft.noise.generator import add_noise
from swaft.noise.presets import NoiseSettings

_FP32_BODIES = frozenset({"t5", "mt5", "umt5", "longt5"})
"""Model types whose 16-bit body takes an fp32 embedding output and keeps it in an fp32 residual stream."""


@dataclass(frozen=True)
class EmbeddingSite:
    """Where noise goes in: the encoder, its token embedding, and the type its body accepts."""

    encoder: nn.Module
    """The encoder stack of an encoder-decoder, or the whole model where there is but one stack."""
    embedding: nn.Module
    """The token embedding whose output is noised."""
    takes_fp32: bool
    """Whether a 16-bit body accepts fp32 embeddings."""
    has_decoder: bool
    """Whether a decoder may run the same embedding, so that only what runs inside the encoder is noised."""
    padding_id: int | None
    """The token that an encoder may pad its input with by itself; None: it cannot."""
    scale: float = 1.0
    """Factor that the embedding applies to its rows by itself (mBART, M2M100, Gemma 3: the root of d); other models
    that scale do it behind the embedding (Pegasus, Marian)."""

    def dtype_for(self, output: torch.dtype) -> torch.dtype:
        """Tell the widest type that may be handed on where the embedding gives ``output``."""
        return _widened(output) if self.takes_fp32 else output


@dataclass
class Embedded:
    """What one hooked pass saw: how often the hook fired, and the last output before and after it."""

    calls: int = 0
    """How often the embedding ran over text; 1 after a pass."""
    clean: Tensor = field(default_factory=lambda: torch.empty(0))
    """The embedding output that the noise was added to, in its own type, detached."""
    handed_on: Tensor = field(default_factory=lambda: torch.empty(0))
    """What the body got instead, in the type it got it, detached."""

    def noise_to_signal(self) -> Tensor:
        """||handed_on - clean|| / ||clean||, the noise that the pass really had: 0-dim, fp32, on its device."""
        return noise_to_signal(self.clean, self.handed_on)

    def changed(self) -> Tensor:
        """The share of the entries that the noise changed: 0-dim, fp32, on its device."""
        wide = _widened(self.clean.dtype)
        return (self.handed_on.to(wide) != self.clean.to(wide)).mean(dtype=torch.float32)


def find_site(model: nn.Module) -> EmbeddingSite:
    """Find the encoder's token embedding in a model, wrapped or not.

    In an encoder-decoder the encoder has an embedding module of its own; the one that the whole model names
    never runs (BART, T5), which is why it is not used.

    Raises:
        NoiseError: for a model without a token embedding, or with one that is no table (I-BERT's is quantised).
    """
    network = unwrap(model)
    get_encoder = getattr(network, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else network
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "get_input_embeddings"):
        encoder = network
    try:
        embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    is_module = isinstance(embedding, nn.Module)  # Perceiver names a tensor
    # Adapters wrap the table.
    if not is_module or not any(isinstance(module, nn.Embedding) for module in embedding.modules()):
        found = f"a {type(embedding).__name__}" if is_module else "no token embedding"
        raise NoiseError(
            f"{type(network).__name__} names {found} to add noise to; expected a Hugging Face text model whose "
            "get_input_embeddings() gives a torch.nn.Embedding. Use swaft.RDrop, which needs none, or "
            "swaft.TaskLoss."
        )
    model_type = getattr(getattr(network, "config", None), "model_type", None)
    return EmbeddingSite(
        encoder,
        embedding,
        takes_fp32=model_type in _FP32_BODIES,
        has_decoder=encoder is not network,
        padding_id=getattr(getattr(encoder, "config", None), "pad_token_id", None),
        # Gemma's embed_scale is a buffer, which to read would make the host wait.
        scale=getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)),
    )


@dataclass(frozen=True)
class Disturbance:
    """The noise of one step; called with an embedding output, it gives the sum of both, fp32 at the least."""

    site: EmbeddingSite | None
    """Where it goes in; None where there is none."""
    settings: NoiseSettings
    """Of the objective."""
    objective: str
    """Its name, for messages."""
    draw: Callable[..., Tensor] = add_noise
    """`add_noise` of an embedding, noise and sigma, its place in the stream given."""
    real: Tensor | None = None
    """Which tokens are no padding (B, T), bool; None where the batch does not say."""

    def __call__(self, embedding: Tensor) -> Tensor:
        """Give the sum of an embedding output and noise, differentiable."""
        assert self.site is not None
        scale = self.site.scale if self.settings.before_scale else 1.0
        sigma: float | Tensor = scale * self.settings.sigma
        if self.settings.relative:
            sigma = sigma * root_mean_square(embedding.detach(), self.real).float()
        return self.draw(embedding, noise=self.settings.noise, sigma=sigma)


@contextmanager
def embedding_hook(
    site: EmbeddingSite,
    disturb: Callable[[Tensor], Tensor] | None = None,
    *,
    detach: bool = False,
    half: bool = False,
) -> Iterator[Embedded]:
    """Run one pass with the embedding output replaced by its sum with noise, in the widest type accepted.

    The clean pass goes through the same hook without ``disturb``, so that both bodies compute in the same types.
    An encoder that pads its input by itself, to whole blocks, may run the embedding once more for that padding
    (LED, BigBird-Pegasus), which stays clean.

    Args:
        site: where to hook.
        disturb: gives the sum (fp32 at the least) of an embedding output and noise, differentiable; None for the
            clean pass.
        detach: send no gradient into the embedding from what is disturbed.
        half: disturb the second half of the rows only, and record that half.

    Yields:
        The record of the pass, filled when the pass has run.

    Raises:
        NoiseError: when the embedding did not run exactly once over text.
    """
    record = Embedded()
    # The encoder's embedding may be the decoder's, too, as after resize_token_embeddings.
    inside = not site.has_decoder

    def enter(*_: object) -> None:
        nonlocal inside
        inside = True

    def leave(*_: object) -> None:
        nonlocal inside
        inside = False

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not inside:
            return None
        if record.calls and site.padding_id is not None and args and not (args[0] != site.padding_id).any():
            return output.to(record.handed_on.dtype)
        clean, own = output.chunk(2) if half else (None, output)
        dtype = site.dtype_for(output.dtype)
        source = own.detach() if detach else own
        handed_on = (source if disturb is None else disturb(source)).to(dtype)
        record.calls += 1
        record.clean, record.handed_on = own.detach(), handed_on.detach()
        return handed_on if clean is None else torch.cat([clean.to(dtype), handed_on])

    handles = [site.embedding.register_forward_hook(hook)]
    if site.has_decoder:  # elsewhere a wrapper may call the model's forward past its hooks, as adapters do
        handles += [
            site.encoder.register_forward_pre_hook(enter),
            site.encoder.register_forward_hook(leave),
        ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
    if record.calls != 1:
        raise NoiseError(
            f"The token embedding of {type(site.encoder).__name__} ran {record.calls} times in one forward "
            "pass; expected once. Pass input_ids (not inputs_embeds, which prompt tuning passes, too), leave out "
            "token_type_ids that share the embedding (GPT-2), and use a model that is not compiled; "
            "swaft.RDrop and swaft.TaskLoss do without the embedding."
        )


def noise_to_signal(clean: Tensor, noised: Tensor) -> Tensor:
    """||noised - clean|| / ||clean||, a 0-dim fp32 tensor; 0 where nothing differs."""
    wide = clean.to(_widened(clean.dtype))
    difference = torch.linalg.vector_norm(noised.to(wide.dtype) - wide)
    return (difference / torch.linalg.vector_norm(wide).clamp(min=torch.finfo(wide.dtype).tiny)).float()


def root_mean_square(embedded: Tensor, real: Tensor | None = None) -> Tensor:
    """sqrt(mean(x^2)) of embedded tokens (B, T, d), a 0-dim tensor, fp32 at the least.

    Args:
        embedded: the output of a token embedding.
        real: which tokens to take (B, T), bool; None, or of another shape (an encoder has padded by itself): all.
    """
    squares = embedded.to(_widened(embedded.dtype)).square()
    if real is None or real.shape != squares.shape[:-1]:
        return squares.mean().sqrt()
    taken = real.sum().clamp(min=1) * squares.shape[-1]
    return ((squares * real.unsqueeze(-1)).sum() / taken).sqrt()


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
