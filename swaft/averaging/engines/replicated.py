"""Engines whose ranks hold the same weights: one process, DDP, DeepSpeed stage 0, and replicas of FSDP2's shards.

Each of the R ranks with the same weights averages one slice of them: 1/R of the memory and the work. Publishing
sends each slice to the other ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.averaging.engines.base import PIECE, Engine, checksum
from swaft.averaging.layout import Fragment, clean_name, cut, merge, slice_of
from swaft.distributed import shared_ranks
from swaft.errors import LayoutError, UnsupportedEngineError

logger = logging.getLogger(__name__)


class ReplicatedEngine(Engine):
    """Weights that several ranks hold; the masters are the parameters themselves or separate tensors.

    Args:
        name: name of the engine.
        module: the unwrapped model.
        inner_optimizers: the torch optimizers that take the steps.
        parameters: their parameters, grouped by master tensor, in the same order on all ranks.
        masters: one fp32 tensor per list of parameters, holding their elements end to end; ``None`` if the
            parameters are their own masters.
        steps_seen: returns the number of steps taken.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inner_optimizers: Sequence[torch.optim.Optimizer],
        *,
        parameters: Sequence[Sequence[nn.Parameter]],
        masters: Sequence[Tensor] | None = None,
        steps_seen: Callable[[], int],
    ):
        super().__init__(name, module, inner_optimizers, steps_seen)
        self.parameters = list(chain.from_iterable(parameters))
        self._working = self._masters = FlatViews(partial(self._tensors, self.parameters))
        if masters is not None:
            numels = [[p.numel() for p in together] for together in parameters]
            self._masters = FlatViews(lambda: masters, numels=numels)
        self._held = self._held_fragments()
        self._replicas, self._replica, self._num_replicas = self._find_replicas()
        self.fragments = slice_of(self._held, self._replica, self._num_replicas)

    def masters(self) -> list[Tensor]:
        """The masters, one flat tensor per parameter."""
        return self._masters()

    def working(self) -> list[Tensor]:
        """The parameters, or what this rank holds of them, flattened."""
        return self._working()

    def prove_layout(self) -> None:
        """As for every engine; also prove that replicas hold the same weights, as each averages a part
        (collective).

        Raises:
            LayoutError: on every rank.
        """
        super().prove_layout()
        if self._num_replicas == 1:
            return
        replicas = dist.get_process_group_ranks(self._replicas)
        found = self.ranks.gather((replicas, checksum(self.working())))
        for rank, (others, bits) in enumerate(found):
            if bits != found[others[0]][1]:
                raise LayoutError(
                    f"rank {rank} holds other weights than rank {others[0]}, and both should be replicas of one "
                    "model, or of one shard (HSDP); expected all ranks to load the same files, or to seed alike, "
                    "and to exchange the gradients of every step (no LocalSGD, no DDP over a part of the ranks)"
                )

    @torch.no_grad()
    def publish(self) -> None:
        """Send every rank's slice of the working weights to its replicas, in bounded pieces (collective)."""
        if self._num_replicas == 1:
            return
        working = self.working()
        for rank in range(self._num_replicas):
            for chunk in cut(merge(slice_of(self._held, rank, self._num_replicas)), PIECE):
                views = [span.of(working) for span in chunk]
                packed = self._on_the_wire(torch.cat(views))
                dist.broadcast(packed, group=self._replicas, group_src=rank)
                if rank != self._replica:
                    for view, values in zip(views, packed.split([v.numel() for v in views]), strict=True):
                        view.copy_(values)

    @staticmethod
    def _tensors(parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """What this rank currently holds of the parameters."""
        return parameters

    def _held_fragments(self) -> list[Fragment]:
        """What this rank holds, in the same order on all its replicas."""
        return [Fragment(self.name_of(p), 0, p.numel(), i, 0) for i, p in enumerate(self.parameters)]

    def _find_replicas(self) -> tuple[Any, int, int]:
        """The group of ranks with the same weights (None: all ranks), this rank's place in it, and its size."""
        return None, self.ranks.rank, self.ranks.world_size

    def _on_the_wire(self, packed: Tensor) -> Tensor:
        """A message on a device from which the replicas' group can send it."""
        return packed


class FlatViews:
    """Flat views of tensors, rebuilt whenever the storage of one of them has changed.

    `module.to`, `weight.data = weight.data.clamp(-1, 1)`, a loaded checkpoint and FSDP2's first forward replace
    storage, and views of the old storage would be averaged from then on. The views keep the old storage alive until
    the next call, so that new storage cannot get the same address and be mistaken for it.

    Args:
        tensors: returns the current tensors; called every time, so it must avoid a Python loop.
        numels: elements of the views that each tensor is cut into; by default one view a tensor.
    """

    def __init__(
        self, tensors: Callable[[], Sequence[Tensor]], *, numels: Sequence[Sequence[int]] | None = None
    ):
        self._tensors = tensors
        self._numels = numels
        self._addresses: list[object] | None = None
        self._views: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        """Flat tensors without gradients; the same list object while no storage has moved.

        Raises:
            LayoutError: a tensor is not contiguous.
        """
        tensors = self._tensors()
        addresses = [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]
        if addresses != self._addresses:
            self._views = [_flat(tensor) for tensor in tensors]
            if self._numels is not None:
                cut_up = zip(self._views, self._numels, strict=True)
                self._views = [view for flat, numels in cut_up for view in flat.split(list(numels))]
            self._addresses = addresses
        return self._views


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise LayoutError(
            f"a trainable tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}, expected a "
            "contiguous one; call `.contiguous()` on it before the optimizer is built"
        )
    return tensor.detach().view(-1)


def optimized(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by name, each once, in the order of its optimizers.

    Whatever else they train (a loss with weights, a second model) is left out, with a warning.

    Raises:
        LayoutError: a trainable parameter of the model is in none of them, or what else they train is sharded.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(p): p for group in groups for p in group["params"] if p.requires_grad and p.numel()}
    names = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    foreign = held.keys() - names.keys()
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.numel() and id(parameter) not in held:
            also = f", which holds {len(foreign)} that the model does not" if foreign else ""
            raise LayoutError(
                f"{names[id(parameter)]!r} is trainable but in no parameter group of the given optimizer{also}; "
                "expected an optimizer that holds every trained parameter, built after the last change to the "
                "model, or all that train it, as a list: WeightAverager(model, [muon, adamw], ...). Or freeze the "
                "parameter with requires_grad_(False)"
            )
    if any(hasattr(held[identity], "device_mesh") for identity in foreign):
        raise LayoutError(
            f"the optimizer trains {len(foreign)} parameters outside of the model that was given to the averager, "
            "sharded by FSDP2, which may keep gathered weights of the model with theirs; expected the whole model. "
            "Give the averager all that is trained together, or the model an optimizer of its own"
        )
    if foreign and shared_ranks().is_main:
        logger.warning(
            "%d of the optimizer's %d trained parameters are not in the model that was given to the averager "
            "(%s), so they are not averaged",
            *(len(foreign), len(held), type(module).__name__),
        )
    return {names[identity]: parameter for identity, parameter in held.items() if identity not in foreign}


def optimized_fp32(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> list[list[nn.Parameter]]:
    """:func:`optimized`, one per list; each is its own fp32 master."""
    parameters = optimized(module, optimizers)
    for name, parameter in parameters.items():
        require_fp32(
            name,
            parameter.dtype,
            "Trainer: bf16=True; recipes: train.mixed_precision=bf16; or DeepSpeed, which keeps fp32 masters",
        )
    return [[parameter] for parameter in parameters.values()]


def require_fp32(name: str, dtype: torch.dtype, setting: str) -> None:
    """Refuse a parameter that is its own master but is not trained in fp32.

    Args:
        name: of the parameter.
        dtype: the dtype it is trained in.
        setting: what casts fp32 weights for the forward under this engine.

    Raises:
        UnsupportedEngineError: names that setting.
    """
    if dtype != torch.float32:
        reason = (
            "an average of such weights stops moving" if dtype.itemsize < 4 else "swaft averages fp32 alone"
        )
        raise UnsupportedEngineError(
            f"{name!r} is trained in {dtype} without a separate fp32 master, and {reason}; load the model in fp32 "
            "(from_pretrained(..., dtype=torch.float32)), or set p.data = p.data.float() for the parameters that "
            "require a gradient before training begins (adapters of a 16-bit model), and let mixed precision cast "
            f"them in the forward ({setting})"
        )
