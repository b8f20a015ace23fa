"""A batch as training passes take it: without labels, so that no model computes a loss of its own."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.checks import generates, is_causal
from swaft.noise.wrappers import unwrap

IGNORE_INDEX = -100
"""The label of a row that does not count, as in Hugging Face models."""

POSITIONS = ("start_positions", "end_positions")
"""The labels of a model that points at answers: their first and last tokens."""


@dataclass(frozen=True)
class Inputs:
    """What a pass is given, and what its logits are held to."""

    arguments: dict[str, Any]
    """Keyword arguments of the model's forward."""
    targets: Tensor
    """The class of each row of logits, int64; IGNORE_INDEX where none counts. (B,), (B, T) of tokens, or (B, 2) of
    the first and the last token to point at."""

    def doubled(self) -> dict[str, Any]:
        """Give the arguments for one pass over the batch twice, (2B, ...)."""
        rows = self.targets.shape[0]
        return {
            name: torch.cat([value, value]) if _is_per_row(value, rows) else value
            for name, value in self.arguments.items()
        }


def prepare_inputs(model: nn.Module, batch: dict[str, Any]) -> Inputs:
    """Take the labels out of a batch, and put in what a model would have made of them.

    Raises:
        NoiseError: for a batch without labels, and for an encoder-decoder that cannot make its decoder's inputs.
    """
    targets = find_targets(model, batch)
    if targets is None:
        raise NoiseError(
            "The batch has no labels; expected a tensor of class indices under the key 'labels', or positions of "
            f"answers under {' and '.join(map(repr, POSITIONS))}."
        )
    arguments = {name: value for name, value in batch.items() if name not in POSITIONS}
    labels = arguments.pop("labels", None)
    if labels is None or not generates(model):
        return Inputs(arguments, targets)
    arguments["use_cache"] = False
    given = (arguments.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if not is_causal(model) and all(each is None for each in given):
        arguments["decoder_input_ids"] = _decoder_input_ids(model, labels)
    return Inputs(arguments, targets)


def find_targets(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """Find what the rows of logits of a batch are held to, see ``Inputs``; None for a batch without labels."""
    starts, ends = (batch.get(name) for name in POSITIONS)
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        return _span_targets(starts, ends, batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if is_causal(model) else labels


def count_items(targets: Tensor) -> Tensor:
    """Count the rows that a loss is the mean of, 0-dim int64; scores (floating point) all count."""
    if targets.is_floating_point():
        return torch.full((), targets.numel(), dtype=torch.int64, device=targets.device)
    return (targets != IGNORE_INDEX).sum()


def proof_rows(model: nn.Module, batch: dict[str, Any], *, at_most: int) -> dict[str, Any]:
    """Cut a batch down to a few of its rows, such as have a label that counts where there are any."""
    labels = batch["labels"]
    counted = (prepare_inputs(model, batch).targets != IGNORE_INDEX).flatten(1).any(1)
    rows = counted.nonzero().flatten()[:at_most]
    if len(rows) == 0:
        rows = torch.zeros(1, dtype=torch.int64, device=labels.device)
    return {
        name: value[rows] if _is_per_row(value, labels.shape[0]) else value for name, value in batch.items()
    }


def _span_targets(starts: Tensor, ends: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Make rows of positions, (B, 2), clamped as Hugging Face models do; past the text none counts."""
    text: Any = arguments.get("input_ids", arguments.get("inputs_embeds"))
    positions = torch.stack([starts, ends], dim=1).clamp(min=0)
    return positions.masked_fill(positions >= text.shape[1], IGNORE_INDEX)


def _decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    network = unwrap(model)
    prepare = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return prepare(labels)  # type: ignore[no-any-return]
    for kind in type(network).__mro__:
        # What the forward of such a model calls by itself (M2M100 and NLLB, Blenderbot).
        shift = getattr(sys.modules.get(kind.__module__), "shift_tokens_right", None)
        if shift is not None and "decoder_start_token_id" in inspect.signature(shift).parameters:
            config: Any = network.config
            return shift(labels, config.pad_token_id, config.decoder_start_token_id)  # type: ignore[no-any-return]
    raise NoiseError(
        f"{type(network).__name__} has no prepare_decoder_input_ids_from_labels; expected it, or "
        "decoder_input_ids in the batch. Have the data collator make them."
    )


def _is_per_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
