"""What lies between a training engine's model and the network inside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Find the Hugging Face model inside DDP, a DeepSpeed engine, torch.compile and a peft adapter."""
    *_, innermost = layers(model)
    get_base_model = getattr(innermost, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else innermost  # type: ignore[return-value]


def is_distributed() -> bool:
    """Whether this process is one of a group that trains together."""
    return dist.is_available() and dist.is_initialized()


def current_rank() -> int:
    """Tell the rank of this process, 0 where there is no group."""
    return dist.get_rank() if is_distributed() else 0


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile, or the module's own ``compile``, has its forward."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Walk from the model to what it wraps, from the outside in."""
    current: nn.Module | None = model
    while current is not None:
        yield current
        inner = [getattr(current, name, None) for name in ("_orig_mod", "module")]
        current = next((module for module in inner if isinstance(module, nn.Module)), None)
