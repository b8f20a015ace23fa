"""What a model returns, as training passes take it: logits of which each row is held to one target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def task_logits(output: Any) -> Any:
    """Give the logits of a pass: the model's own, or those of first and last tokens as two rows a text.

    A row of the latter is a distribution over all tokens of the text as it was batched. Padding is among them,
    because the question-answering heads of Hugging Face models do not mask it: their own loss has it, too.

    Args:
        output: what the model returned.

    Returns:
        (..., V), or (B, 2, L) of a model that points at answers; None where there are none.
    """
    starts, ends = (getattr(output, name, None) for name in ("start_logits", "end_logits"))
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        return torch.stack([starts, ends], dim=1)
    return getattr(output, "logits", None)
