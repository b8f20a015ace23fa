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
from swaft.noise.loss.options import wide_dtype
from swaft.noise.presets import NoiseSettings

_FP32_BODIES = frozenset({"t5", "mt5", "umt5", "longt5"})
"""Model types whose 16-bit body accepts an fp32 embedding output and keeps it in an fp32 residual stream."""


@dataclass(frozen=True)
class EmbeddingSite:
    """Where noise goes in: the encoder, its token embedding, and the dtype its body accepts."""

    encoder: nn.Module
    """The encoder stack of an encoder-decoder, or the whole model if there is only one stack."""
    embedding: nn.Module
    """The token embedding whose output gets noise."""
    takes_fp32: bool
    """Whether a 16-bit body accepts fp32 embeddings."""
    has_decoder: bool
    """Whether a decoder may run the same embedding; then noise is added only inside the encoder."""
    padding_id: int | None
    """The token that an encoder may pad its own input with; None: it does not."""
    scale: float = 1.0
    """Factor that the embedding itself applies to its rows (mBART, M2M100, Gemma 3: the square root of d); other
    models that scale do so after the embedding (Pegasus, Marian)."""


@dataclass
class Embedded:
    """The record of one hooked pass: how often the hook fired, and the last output before and after it."""

    calls: int = 0
    """How often the embedding ran on text; 1 after a pass."""
    clean: Tensor = field(default_factory=lambda: torch.empty(0))
    """The embedding output that the noise was added to, in its own dtype, detached."""
    handed_on: Tensor = field(default_factory=lambda: torch.empty(0))
    """What the body got instead, in the dtype it got, detached."""

    def noise_to_signal(self, real: Tensor | None = None) -> Tensor:
        """||handed_on - clean|| / ||clean||, the noise that the pass actually had: 0-dim, fp32, on its device.

        Args:
            real: which tokens to take, as in `root_mean_square`.
        """
        rows = _real_rows(self.clean, real)
        if rows is None:
            return noise_to_signal(self.clean, self.handed_on)
        return noise_to_signal(self.clean * rows, self.handed_on * rows)

    def changed(self, real: Tensor | None = None) -> Tensor:
        """The share of the same tokens' entries that the noise changed: 0-dim, fp32, on its device."""
        rows, wide = _real_rows(self.clean, real), wide_dtype(self.clean)
        changed = self.handed_on.to(wide) != self.clean.to(wide)
        if rows is None:
            return changed.mean(dtype=torch.float32)
        return (changed & rows).sum().float() / (rows.sum().clamp(min=1) * changed.shape[-1])


def find_site(model: nn.Module) -> EmbeddingSite:
    """Find the encoder's token embedding in a model, wrapped or not.

    In an encoder-decoder, the encoder has its own embedding module. The one that the whole model reports never runs
    (BART, T5), so it is not used.

    Raises:
        NoiseError: the model has no token embedding, or one that is not a table (I-BERT's is quantised).
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
    is_module = isinstance(embedding, nn.Module)  # Perceiver returns a tensor
    # Adapters wrap the table, and do not pass on its attributes.
    inside = embedding.modules() if is_module else ()
    table = next((module for module in inside if isinstance(module, nn.Embedding)), None)
    if not is_module or table is None:
        found = f"a {type(embedding).__name__}" if is_module else "no token embedding"
        raise NoiseError(
            f"{type(network).__name__} names {found} to add noise to; expected a Hugging Face text model whose "
            "get_input_embeddings() gives a torch.nn.Embedding. Use swaft.RDrop, which needs none, or "
            "swaft.TaskLoss (noise.kind=rdrop or none)."
        )
    model_type = getattr(getattr(network, "config", None), "model_type", None)
    return EmbeddingSite(
        encoder,
        embedding,
        takes_fp32=model_type in _FP32_BODIES,
        has_decoder=encoder is not network,
        padding_id=getattr(getattr(encoder, "config", None), "pad_token_id", None),
        # Gemma's embed_scale is a buffer; reading it would make the host wait.
        scale=getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)),
    )


@dataclass(frozen=True)
class Disturbance:
    """The noise of one step; called with an embedding output, it returns the sum of both, in at least fp32."""

    site: EmbeddingSite | None
    """Where it goes in; None without noise."""
    settings: NoiseSettings
    """Of the objective."""
    objective: str
    """Its name, for messages."""
    draw: Callable[..., Tensor] = add_noise
    """`add_noise` as a function of embedding, noise and sigma, at the current place in the stream."""
    real: Tensor | None = None
    """Which tokens are not padding (B, T), bool; None if the batch does not say."""

    def __call__(self, embedding: Tensor) -> Tensor:
        """Return the sum of an embedding output and noise, differentiable."""
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
    """Run one pass with noise added to the embedding output, in the widest dtype accepted.

    The clean pass goes through the same hook without ``disturb``, so that both passes compute in the same dtypes.
    An encoder that pads its own input to whole blocks may run the embedding once more for that padding (LED,
    BigBird-Pegasus), which stays clean.

    Args:
        site: where to hook.
        disturb: returns the sum (in at least fp32) of an embedding output and noise, differentiable; None for the
            clean pass.
        detach: pass no gradient from the noised rows to the embedding.
        half: add noise only to the second half of the rows, and record that half.

    Yields:
        The record of the pass, filled when the pass has run.

    Raises:
        NoiseError: the embedding did not run exactly once on text.
    """
    record = Embedded()
    # The encoder's embedding may also be the decoder's, as after resize_token_embeddings.
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
        dtype = wide_dtype(output) if site.takes_fp32 else output.dtype
        source = own.detach() if detach else own
        handed_on = (source if disturb is None else disturb(source)).to(dtype)
        record.calls += 1
        record.clean, record.handed_on = own.detach(), handed_on.detach()
        return handed_on if clean is None else torch.cat([clean.to(dtype), handed_on])

    handles = [site.embedding.register_forward_hook(hook)]
    if site.has_decoder:  # without one, wrappers (adapters) may bypass the model's hooks
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
            "swaft.RDrop and swaft.TaskLoss (noise.kind=rdrop or none) do not need the embedding."
        )


def noise_to_signal(clean: Tensor, noised: Tensor) -> Tensor:
    """||noised - clean|| / ||clean||, a 0-dim fp32 tensor; 0 if nothing differs."""
    wide = clean.to(wide_dtype(clean))
    difference = torch.linalg.vector_norm(noised.to(wide.dtype) - wide)
    return (difference / torch.linalg.vector_norm(wide).clamp(min=torch.finfo(wide.dtype).tiny)).float()


def root_mean_square(embedded: Tensor, real: Tensor | None = None) -> Tensor:
    """sqrt(mean(x^2)) of embedded tokens (B, T, d), a 0-dim tensor, in at least fp32.

    Args:
        embedded: the output of a token embedding.
        real: which tokens to take (B, T), bool; all if None or of another shape (if the encoder has padded its
            input).
    """
    squares, rows = embedded.to(wide_dtype(embedded)).square(), _real_rows(embedded, real)
    if rows is None:
        return squares.mean().sqrt()
    taken = rows.sum().clamp(min=1) * squares.shape[-1]
    return ((squares * rows).sum() / taken).sqrt()


def _real_rows(embedded: Tensor, real: Tensor | None) -> Tensor | None:
    """Which tokens of (B, T, d) to take, (B, T, 1), bool; None for all, see `root_mean_square`."""
    return None if real is None or real.shape != embedded.shape[:-1] else real.unsqueeze(-1)
