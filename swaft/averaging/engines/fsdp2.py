"""FSDP2 (`torch.distributed.fsdp.fully_shard`): the sharded fp32 parameters are the masters.

Read in torch 2.13 (`torch/distributed/fsdp/_fully_shard`). Every parameter is a DTensor cut into rows over the
ranks, unevenly where they do not divide; a forward gathers copies in the compute dtype and puts them into the
module. The root's copies stay there after the forward, and a change of the shards is not seen until they are
dropped. So everything is resharded before the module is looked at, and after the shards are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swaft.averaging.engines.base import AppliedSteps, Engine
from swaft.averaging.engines.views import FlatViews
from swaft.averaging.layout import Fragment
from swaft.errors import LayoutError, UnsupportedEngineError


class FSDP2Engine(Engine):
    """Parameters that `fully_shard` cut into rows, by hand or through accelerate.

    Args:
        module: the unwrapped model, resharded (:func:`reshard`).
        inner_optimizer: the torch optimizer that takes the steps.
        parameters: its parameters, which it holds sharded whatever the module holds at the moment.
        applied_steps: counts the steps that were taken.
    """

    name = "fsdp2"

    def __init__(
        self,
        module: nn.Module,
        inner_optimizer: torch.optim.Optimizer,
        *,
        parameters: Sequence[nn.Parameter],
        applied_steps: AppliedSteps,
    ):
        super().__init__(module, inner_optimizer)
        self._applied_steps = applied_steps
        # The local tensor of a DTensor is fetched the way FSDP2 itself does: `to_local()` is a call each.
        self._shards = FlatViews(lambda: list(map(_LOCAL, parameters)))
        self.fragments = [
            fragment
            for i, parameter in enumerate(parameters)
            for fragment in _row_fragments(self.name_of(parameter), cast(DTensor, parameter), buffer=i)
        ]

    def masters(self) -> list[Tensor]:
        """The rows of every parameter that this rank holds, flattened."""
        return self._shards()

    def working(self) -> list[Tensor]:
        """The same: forwards gather from these rows."""
        return self._shards()

    def counted_steps(self) -> int:
        """Optimizer steps that changed the weights."""
        return self._applied_steps()

    def named_parameters(self, *, aliases: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter by its clean name, sharded whatever a forward has left in the module."""
        self.release_gathered()
        yield from super().named_parameters(aliases=aliases)

    def publish(self) -> None:
        """Have the next forward gather anew."""
        self.release_gathered()

    def release_gathered(self) -> None:
        """Drop every gathered copy."""
        reshard(self.module)

    def gather_working(self, parameter: nn.Parameter) -> Tensor:
        """A parameter whole, as forwards see it, in host memory, on every rank (collective where it is sharded)."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        # An offloaded shard lies on the host, where the ranks' process group may have no backend.
        rows = cast(DTensor, parameter.detach().to(parameter.device_mesh.device_type))
        return rows.full_tensor().cpu()


def reshard(module: nn.Module) -> None:
    """Put the sharded parameters back into every part of a module that holds gathered ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def refuse_layout(name: str, parameter: nn.Parameter) -> None:
    """Refuse a trainable parameter that is not cut into rows over all ranks, in fp32.

    Raises:
        UnsupportedEngineError: naming the parameter and the setting.
    """
    if not isinstance(parameter, DTensor):
        raise UnsupportedEngineError(
            f"{name!r} is trainable but not sharded, and FSDP2 does not keep such a parameter equal on all ranks; "
            "call `fully_shard` on the whole model after its parts, and leave trainable parameters out of "
            "`ignored_params` (accelerate: `ignored_modules`)"
        )
    mesh = parameter.device_mesh
    if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
        raise UnsupportedEngineError(
            f"{name!r} is laid out over a mesh of shape {tuple(mesh.shape)} {mesh.mesh_dim_names or ''} with "
            f"{dist.get_world_size()} ranks training: hybrid sharding (HSDP) or another parallelism beside FSDP2, "
            "which this version does not average; expected one mesh dimension over all ranks: give `fully_shard` "
            "a 1-D mesh (accelerate: dp_replicate_size=1 and no tp_size, cp_size or ep_size)"
        )
    if parameter.placements != (Shard(0),):
        raise UnsupportedEngineError(
            f"{name!r} has the placement {parameter.placements}, expected (Shard(dim=0),), the default of "
            "`fully_shard`; leave out its `shard_placement_fn`"
        )
    if parameter.dtype != torch.float32:
        raise UnsupportedEngineError(
            f"{name!r} is sharded in {parameter.dtype} with no fp32 master beside it, and an average of such "
            "weights stands still; load the model in fp32 and let mixed precision cast it: "
            "`mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)` (accelerate: mixed_precision=bf16)"
        )


_LOCAL = attrgetter("_local_tensor")


def _row_fragments(name: str, parameter: DTensor, *, buffer: int) -> list[Fragment]:
    """The rows that this rank holds of one parameter; none where there are fewer rows than ranks."""
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
