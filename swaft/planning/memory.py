"""What a plan is made of: weights, the shape of a run, and the memory of one rank in each phase. Plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FP32 = 4
"""Bytes of a master weight, of its gradient and of each of AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of the model; a tied one counts once."""

    numel: int
    rows: int = 1
    """Size of its first dimension."""
    itemsize: int
    """Bytes of an element of the working weight."""
    group: int | None
    """Parameter group of the optimizer; None: frozen."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole working weight."""
        return self.numel * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a model is trained, as far as memory depends on it."""

    weights: Sequence[Weight]
    """In the order of ``model.parameters()``."""
    world_size: int
    on_cpu: bool
    """The ranks compute on the host and talk over gloo."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    kept_bytes: int = 0
    """What a micro-batch leaves until the next one: its logits, for the most part."""

    def numel_of(self, group: int) -> int:
        """Elements of one parameter group."""
        return sum(weight.numel for weight in self.weights if weight.group == group)

    @property
    def groups(self) -> list[int]:
        """The optimizer's parameter groups."""
        return sorted({weight.group for weight in self.weights if weight.group is not None})

    @property
    def trainable(self) -> int:
        """Elements that are trained."""
        return sum(weight.numel for weight in self.weights if weight.group is not None)

    @property
    def frozen(self) -> int:
        """Elements that are not."""
        return sum(weight.numel for weight in self.weights if weight.group is None)

    @property
    def working_bytes(self) -> int:
        """Bytes of all working weights."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the working weights that are not trained."""
        return sum(weight.nbytes for weight in self.weights if weight.group is None)


@dataclass(frozen=True)
class Phase:
    """Memory of one rank at the fullest moment of a part of the run, by name."""

    name: str
    device: Mapping[str, int]
    """Bytes on the rank's device; on a CPU that is the host."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Bytes in host memory."""

    @property
    def device_bytes(self) -> int:
        """All on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All in host memory."""
        return sum(self.host.values())


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds on the rank that holds most."""

    phases: Sequence[Phase]
    owned: int
    """Master elements that this rank updates, and averages."""


def adam_temporaries(numels: Sequence[int], *, on_cpu: bool) -> int:
    """Most bytes that one step of AdamW takes for itself.

    ``sqrt(v) / c + eps`` is made of two tensors on a CPU, where torch steps one parameter after another, and of
    one, changed in place, on a device, where it steps all parameters of a group together (``foreach``).

    Args:
        numels: elements of the tensors that the optimizer holds in one parameter group.
        on_cpu: whether they are on the host.
    """
    return 2 * FP32 * max(numels, default=0) if on_cpu else FP32 * sum(numels)


def sized(count: int) -> str:
    """Write a number of bytes as people do: ``1.25 GiB``, ``3.2 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"
