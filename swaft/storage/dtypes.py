"""The types that weights are written in."""

from __future__ import annotations

import torch

from swaft.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of_weights(dtype: str | torch.dtype) -> torch.dtype:
    """Understand a type that weights are to be written in, ``"bfloat16"`` and ``torch.bfloat16`` alike.

    Raises:
        ConfigError: for any but those of DTYPES.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}, or torch's of that name")
    return found
