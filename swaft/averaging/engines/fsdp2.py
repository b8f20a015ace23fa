"""FSDP2 (`torch.distributed.fsdp.fully_shard`): the sharded fp32 parameters are the masters.

Based on torch 2.13 (`torch/distributed/fsdp/_fully_shard`). Every parameter is a DTensor cut into rows over the
ranks, unevenly if they do not divide; a forward gathers copies in the compute dtype and puts them into the module.
The root's copies stay there after the forward, and a change of the shards is not seen until they are dropped. So
everything is resharded before the module is inspected and after the shards are written.

On a two-dimensional mesh (HSDP), the rows are cut over the second dimension. The ranks along the first dimension
hold the same rows, and each averages a slice of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swaft.averaging.engines.replicated import ReplicatedEngine, require_fp32
from swaft.averaging.layout import Fragment
from swaft.errors import LayoutError, UnsupportedEngineError


class FSDP2Engine(ReplicatedEngine):
    """Parameters that `fully_shard` cut into rows, by hand or through accelerate.

    The module has been resharded first (:func:`reshard`); `parameters` stay sharded, whatever the module holds
    later.
    """

    def named_parameters(self, *, aliases: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter with its clean name, always sharded, whatever a forward has left in the module."""
        self.release_gathered()
        yield from super().named_parameters(aliases=aliases)

    def publish(self) -> None:
        """Make the next forward gather again (collective if shards have replicas)."""
        super().publish()
        self.release_gathered()

    def release_gathered(self) -> None:
        """Drop every gathered copy."""
        reshard(self.module)

    def gather_working(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, as forwards see it, in host memory, on every rank (collective if it is sharded)."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        return cast(DTensor, self._on_the_wire(parameter.detach())).full_tensor().cpu()

    @staticmethod
    def _tensors(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        # The local tensor of a DTensor is fetched as FSDP2 itself does it: `to_local()` would be a Python call for
        # each.
        return list(map(_LOCAL, parameters))

    def _held_fragments(self) -> list[Fragment]:
        return [
            fragment
            for i, parameter in enumerate(self.parameters)
            for fragment in _row_fragments(self.name_of(parameter), cast(DTensor, parameter), buffer=i)
        ]

    @property
    def _mesh(self) -> Any:
        return cast(DTensor, self.parameters[0]).device_mesh if self.parameters else None

    def _find_replicas(self) -> tuple[Any, int, int]:
        if self._mesh is None or self._mesh.ndim == 1:
            return None, 0, 1
        return self._mesh.get_group(0), self._mesh.get_local_rank(0), self._mesh.size(0)

    def _on_the_wire(self, packed: Tensor) -> Tensor:
        # An offloaded shard is on the host, for which the ranks' process group may have no backend.
        return packed if self._mesh is None else packed.to(self._mesh.device_type)


def reshard(module: nn.Module) -> None:
    """Put the sharded parameters back into every submodule that holds gathered ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def refuse_layout(name: str, parameter: nn.Parameter) -> None:
    """Refuse a trainable parameter that is not cut into rows over all ranks, in fp32.

    Raises:
        UnsupportedEngineError: names the parameter and the setting.
    """
    if not isinstance(parameter, DTensor):
        raise UnsupportedEngineError(
            f"{name!r} is trainable but not sharded, and FSDP2 does not keep such a parameter equal on all ranks; "
            "call `fully_shard` on the whole model after its parts, and leave trainable parameters out of "
            "`ignored_params` (accelerate: `ignored_modules`)"
        )
    mesh = parameter.device_mesh
    if mesh.size() != dist.get_world_size():
        raise UnsupportedEngineError(
            f"{name!r} is laid out over a mesh of shape {tuple(mesh.shape)} {mesh.mesh_dim_names or ''} with "
            f"{dist.get_world_size()} ranks training: a second kind of parallelism, which this version does "
            "not average; expected a mesh over all ranks, (shard) or (replicate, shard): accelerate without "
            "tp_size, cp_size and ep_size"
        )
    if parameter.placements not in ((Shard(0),), (Replicate(), Shard(0))):
        raise UnsupportedEngineError(
            f"{name!r} has the placement {parameter.placements}, expected (Shard(dim=0),), or (Replicate(), "
            "Shard(dim=0)) on a two-dimensional mesh, the defaults of `fully_shard`; leave out its "
            "`shard_placement_fn`, and do not combine it with tensor parallelism"
        )
    policy = "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16); accelerate: mixed_precision=bf16"
    require_fp32(name, parameter.dtype, policy)


_LOCAL = attrgetter("_local_tensor")


def _row_fragments(name: str, parameter: DTensor, *, buffer: int) -> list[Fragment]:
    """The rows of one parameter that this rank holds; none if there are fewer rows than ranks."""
    held = _LOCAL(parameter)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if tuple(shape) != tuple(held.shape):
        raise LayoutError(
            f"this rank holds {tuple(held.shape)} of {name!r} under fsdp2, where torch's own layout says "
            f"{tuple(shape)}; swaft does not know this layout, so it does not average it"
        )
    if not held.numel():
        return []
    start = offset[0] * (parameter.numel() // parameter.shape[0])
    return [Fragment(name, start, start + held.numel(), buffer, 0)]
