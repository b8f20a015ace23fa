"""Inputs and outputs of training passes: no labels in, so that no model computes its own loss; logits out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swaft.errors import NoiseError
from swaft.noise.checks import generates, is_causal, shifts_labels, unwrap

IGNORE_INDEX = -100
"""The label of a row that does not count, as in Hugging Face models."""

POSITIONS = ("start_positions", "end_positions")
"""The labels of an extractive question-answering model: first and last tokens of the answers."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a pass, and the targets of its logits."""

    arguments: dict[str, Any]
    """Keyword arguments of the model's forward."""
    targets: Tensor
    """The class of each row of logits, int64; IGNORE_INDEX for rows that do not count. Shape (B,), (B, T) for
    tokens, or (B, 2) for the first and last token of an answer."""
    weights: Tensor | None = None
    """Factor of each row in a mean, shaped like the targets, where they are first and last tokens; None: 1."""

    def doubled(self) -> dict[str, Any]:
        """The arguments for one pass over the batch concatenated with itself, (2B, ...).

        Raises:
            NoiseError: an argument does not have one row per row of the batch (images, several of a text).
        """
        rows = self.targets.shape[0]
        if others := _of_other_rows(self.arguments, rows):
            raise NoiseError(
                f"{others[0]} has shape {tuple(self.arguments[others[0]].shape)} in a batch of {rows} rows, so "
                "passes='doubled' cannot double it; expected one row per row. Set passes='two'."
            )
        return {
            name: torch.cat([value, value]) if _is_per_row(value, rows) else value
            for name, value in self.arguments.items()
        }


def as_arguments(batch: Any) -> dict[str, Any]:
    """A batch as a plain dictionary.

    Raises:
        NoiseError: it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise NoiseError(
            f"The batch is a {type(batch).__name__}; expected the arguments of the model's forward by name, such "
            "as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}."
        )
    return dict(batch)


def prepare_inputs(model: nn.Module, batch: dict[str, Any]) -> Inputs:
    """Take the labels out of a batch, and add the inputs that a model would have made from them.

    Raises:
        NoiseError: the batch has no labels, has labels that are not class indices, or asks for only some of the
            logits; or an encoder-decoder cannot make its decoder inputs.
    """
    targets = find_targets(model, batch)
    if targets is None:
        raise NoiseError(
            "The batch has no labels; expected a tensor of class indices under the key 'labels', or positions of "
            f"answers under {' and '.join(map(repr, POSITIONS))}."
        )
    _check_batch(batch, targets)
    arguments = {name: value for name, value in batch.items() if name not in POSITIONS}
    labels = arguments.pop("labels", None)
    if all(isinstance(batch.get(name), Tensor) for name in POSITIONS):
        return Inputs(arguments, targets, _end_weights(targets))
    if not generates(model):
        return Inputs(arguments, targets)
    arguments = without_cache(model, arguments)
    given = (arguments.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if not is_causal(model) and all(each is None for each in given):
        arguments["decoder_input_ids"] = _decoder_input_ids(model, labels)
    return Inputs(arguments, targets)


def without_cache(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Turn off a generating model's cache, unless the batch sets it.

    A cache takes memory. It also makes transformers overlook that texts are packed (position_ids that start again,
    no mask), so that they attend to each other. So the pass with labels and those without must agree on it.
    """
    if "use_cache" in arguments or not generates(model):
        return arguments
    parameters = inspect.signature(unwrap(model).forward).parameters
    if "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return arguments | {"use_cache": False}
    return arguments


def find_targets(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """The targets of a batch's rows of logits, see ``Inputs``; None for a batch without labels."""
    starts, ends = (batch.get(name) for name in POSITIONS)
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        return _span_targets(starts, ends, batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if shifts_labels(model) else labels


def count_averaged(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Count what the model's own loss is a mean over, 0-dim int64: counted rows, or rows if no labels are found."""
    targets = find_targets(model, batch)
    return torch.tensor(count_rows(batch)) if targets is None else count_items(targets)


def count_items(targets: Tensor) -> Tensor:
    """Count the rows that a loss is averaged over, 0-dim int64; floating-point scores all count."""
    if targets.is_floating_point():
        return torch.full((), targets.numel(), dtype=torch.int64, device=targets.device)
    return (targets != IGNORE_INDEX).sum()


def count_rows(batch: dict[str, Any]) -> int:
    """Count the rows of a batch without labels by its first tensor, or else its first list; 1 if it has neither."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    lists = [value for value in batch.values() if isinstance(value, list)]
    return next((len(value) for value in (*tensors, *lists)), 1)


def mean_cross_entropy(logits: Tensor, inputs: Inputs, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of the counted rows as Hugging Face models compute it, 0-dim; NaN if no row counts.

    Args:
        logits: of the task (..., V), in at least fp32.
        inputs: their targets and weights.
        label_smoothing: share of the target that is spread over all classes.
    """

    def reduced(reduction: str) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, -2),
            inputs.targets.flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    mean = reduced("mean")
    if inputs.weights is None:
        return mean
    # Added, so that weights of 1 change no bit.
    change = ((inputs.weights.flatten() - 1) * reduced("none")).sum()
    return mean + change / count_items(inputs.targets).clamp(min=1)


def real_tokens(arguments: dict[str, Any]) -> Tensor | None:
    """Which tokens of the noised texts are not padding, bool; None if the batch does not say.

    Returns:
        (B, T); (B * C, T) for C choices, which a model embeds as texts of their own.
    """
    mask = arguments.get("attention_mask")
    return mask.flatten(0, -2) != 0 if isinstance(mask, Tensor) and mask.dim() in (2, 3) else None


def part(output: Any, name: str) -> Any:
    """A named part of what a model returned: an attribute, or the value of a mapping; None if there is none."""
    value = getattr(output, name, None)
    return output.get(name) if value is None and isinstance(output, Mapping) else value


def task_logits(output: Any) -> Any:
    """The logits of a pass: the model's own, or those of first and last tokens as two rows per text.

    In the second case, a row is a distribution over all tokens of the text as batched. This includes padding,
    because the question-answering heads of Hugging Face models do not mask it: their own loss includes it, too.

    Args:
        output: what the model returned.

    Returns:
        (..., V), or (B, 2, L) for extractive question answering; None if there are none.
    """
    starts, ends = (part(output, name) for name in ("start_logits", "end_logits"))
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        return torch.stack([starts, ends], dim=1)
    return part(output, "logits")


def proof_rows(model: nn.Module, batch: dict[str, Any], *, at_most: int) -> dict[str, Any]:
    """Cut a batch down to a few rows, preferring rows with a label that counts.

    It stays whole if it has several things per row (images of a text), since it does not say whose they are.
    """
    labels = batch["labels"]
    if _of_other_rows(batch, labels.shape[0]):
        return batch
    counted = (prepare_inputs(model, batch).targets != IGNORE_INDEX).flatten(1).any(1)
    rows = counted.nonzero().flatten()[:at_most]
    if len(rows) == 0:
        rows = torch.zeros(min(1, len(labels)), dtype=torch.int64, device=labels.device)
    return {
        name: value[rows] if _is_per_row(value, labels.shape[0]) else value for name, value in batch.items()
    }


def _check_batch(batch: dict[str, Any], targets: Tensor) -> None:
    # Floating-point labels of more dimensions mean several per row, which check_rows refuses.
    if targets.dtype != torch.int64 and not (targets.is_floating_point() and targets.dim() > 1):
        raise NoiseError(
            f"The labels are {targets.dtype}; expected class indices, torch.int64. Convert them "
            "(labels.long()), or, where they are numbers to predict, use swaft.TaskLoss without label smoothing "
            "(noise.kind=none)."
        )
    for name in ("logits_to_keep", "num_logits_to_keep"):
        kept = batch.get(name)
        if isinstance(kept, Tensor) or kept:
            raise NoiseError(
                f"The batch has {name}, with which the model computes logits for only some positions; expected "
                "logits of every position that has a label. Leave it out of the batch, and set the labels of the "
                f"positions that should not count to {IGNORE_INDEX}."
            )


def _span_targets(starts: Tensor, ends: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Positions as targets, (B, 2), clamped as in Hugging Face models; positions past the text do not count."""
    text: Any = arguments.get("input_ids", arguments.get("inputs_embeds"))
    positions = torch.stack([starts, ends], dim=1).clamp(min=0)
    return positions.masked_fill(positions >= text.shape[1], IGNORE_INDEX)


def _end_weights(targets: Tensor) -> Tensor:
    """Factors (B, 2) that make the mean over all counted ends one of two means, over first and over last tokens.

    That is the loss of Hugging Face models. The factors are 1 if as many count of both, or none of one.
    """
    counted = (targets != IGNORE_INDEX).sum(0)
    means = (counted > 0).sum()
    return torch.where(counted > 0, counted.sum() / (means * counted), 1.0).expand_as(targets)


def _decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    network = unwrap(model)
    prepare = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return prepare(labels)  # type: ignore[no-any-return]
    for kind in type(network).__mro__:
        # What the forward of such a model calls itself (M2M100 and NLLB, Blenderbot).
        shift = getattr(sys.modules.get(kind.__module__), "shift_tokens_right", None)
        if shift is not None and "decoder_start_token_id" in inspect.signature(shift).parameters:
            config: Any = network.config
            return shift(labels, config.pad_token_id, config.decoder_start_token_id)  # type: ignore[no-any-return]
    raise NoiseError(
        f"{type(network).__name__} has no prepare_decoder_input_ids_from_labels; expected it, or "
        "decoder_input_ids in the batch. Have the data collator make them."
    )


def _of_other_rows(arguments: dict[str, Any], rows: int) -> list[str]:
    """Names of the tensors that have neither one row per row of the batch nor one for all."""
    return [
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] not in (1, rows)
    ]


def _is_per_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
