"""FSDP2 as the launcher asked for it, done here where accelerate 1.15 would train wrongly without a word.

The launcher's file says what to shard and how; three things are done otherwise than in
`accelerate/utils/fsdp_utils.py` and `accelerate/state.py`:

* accelerate shards the token embedding and the head apart from the rest. A tied pair that some third module
  shares too, as the encoder of a T5 does, comes apart, and one of the copies is in no optimizer; an embedding that
  lies in a block that is sharded as one, as BERT's does, is sharded twice and fails. Here blocks are sharded one
  by one, and what lies outside of them together, so that what is tied stays tied.
* accelerate sums gradients over ranks, and hands on what the model returns, in the format it computes in.
* Without CUDA accelerate reads the plugin nowhere and starts DDP. All that it does later (accumulating, clipping)
  asks its state, so the state is set as it would have been on GPUs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from swaft.errors import ConfigError, TrainingError
from swaft.training.config import TrainConfig

logger = logging.getLogger(__name__)

OBEYED_OTHERWISE = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading: every rank loads the whole model",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: taken as train.gradient_checkpointing=true",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "fsdp_activation_checkpointing_offload: nothing of it is offloaded",
}
"""What a launcher's file may ask for that comes to the same weights otherwise: accelerate's variable, and how."""


def uses_fsdp(environ: Mapping[str, str]) -> bool:
    """Whether the launcher asked for FSDP."""
    return environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def obey_fsdp2(environ: Mapping[str, str], train: TrainConfig) -> None:
    """Take over what the launcher's file asks of FSDP2 and the recipe does itself, and log how.

    Args:
        environ: what the launcher left.
        train: section ``train``; its ``gradient_checkpointing`` is switched on where the launcher wants that.
    """
    for name, how in OBEYED_OTHERWISE.items() if uses_fsdp(environ) else ():
        if _is_on(environ, name):
            logger.info("%s", how)
            train.gradient_checkpointing |= name == "FSDP_ACTIVATION_CHECKPOINTING"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() not in ("false", "")


def resolve_fsdp2(environ: Mapping[str, str], *, precision: str) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's plugin for FSDP2, or None where the launcher did not ask for FSDP.

    Weights and the sums of gradients, over micro-batches and over ranks, are fp32. A forward and its backward
    compute in ``precision``; a loss that the model computes in fp32 leaves it as it is.

    Args:
        environ: what the launcher left.
        precision: ``no``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: where the launcher asks for FSDP1, or for what would leave weights apart.
    """
    if not uses_fsdp(environ):
        return None
    version = environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"the launcher asks for FSDP version {version}, which swaft's recipes do not train with; set "
            "fsdp_version: 2 in the accelerate configuration, as launch/accelerate/fsdp2.yaml does"
        )
    if _is_on(environ, "FSDP_IGNORED_MODULES"):
        raise ConfigError(
            "the launcher asks for fsdp_ignored_modules: every rank would train those weights apart; remove it"
        )
    computes_in = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # What one block hands to the next stays as it is, as under DeepSpeed: noise may be too small for 16 bits.
    policy = MixedPrecisionPolicy(computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = {name: value for name, value in environ.items() if name.startswith("FSDP_")}
    try:
        # Where accelerate reads the rest.
        with patch_environment(**settings | dict.fromkeys(OBEYED_OTHERWISE, "false")):
            return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    except ValueError as error:
        raise ConfigError(f"the launcher's fsdp_config: {error}") from error


def start_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have an accelerator that started ranks without CUDA work as one that started with FSDP2."""
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning asks for a device
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loader: DataLoader[Any],
) -> tuple[nn.Module, Any, DataLoader[Any]]:
    """Hand model, optimizer and loader over to the engine, as ``accelerator.prepare`` returns them (collective).

    Args:
        accelerator: nothing prepared yet.
        model: on the host, the same on every rank.
        build_optimizer: makes the optimizer of a model's parameters.
        loader: training batches.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(model, build_optimizer(model), loader)
    shard(model, accelerator.state.fsdp_plugin)  # type: ignore[arg-type]
    # The optimizer comes after: sharding puts other parameters into the model.
    optimizer = accelerator.prepare_optimizer(build_optimizer(model))
    return model, optimizer, accelerator.prepare_data_loader(loader)


def shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Cut a model's parameters into rows over all ranks, in place (collective).

    Every block that the launcher's policy names is gathered by itself, and the rest together with the model. A
    block with a parameter that is tied to one elsewhere belongs to the rest.

    Args:
        model: on the host, the same on every rank.
        plugin: from `resolve_fsdp2`.

    Raises:
        TrainingError: where a trainable parameter is left whole, so that ranks would train it apart.
    """
    settings: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy,
        "offload_policy": plugin.cpu_offload,
    }
    blocks = find_blocks(model, plugin)
    if not blocks:
        logger.warning(
            "FSDP2 found no blocks to shard one by one, so all weights are gathered for every pass; name the "
            "classes of the model's layers in fsdp_transformer_layer_cls_to_wrap of the accelerate configuration"
        )
    for block in reversed(blocks):  # the inner ones first
        fully_shard(block, reshard_after_forward=bool(plugin.reshard_after_forward), **settings)
    fully_shard(model, **settings)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise TrainingError(
                f"{name!r} is whole although the launcher asked for FSDP2, so the ranks would train it apart; "
                "train this model under DDP or DeepSpeed"
            )


def find_blocks(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """Return the parts of a model, whole or on paper, that are gathered one by one, the outer ones first.

    Raises:
        ConfigError: the launcher names a class of layers that the model does not have.
    """
    try:
        plugin.set_auto_wrap_policy(model)
    except ValueError as error:
        there = sorted({type(part).__name__ for part in model.modules() if any(part.children())})
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap of the accelerate configuration: {error} Expected some of "
            f"{', '.join(there)}; leave it out to take the model's own"
        ) from error
    return blocks_of(model, fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False))


def blocks_of(model: nn.Module, is_block: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Return the parts of a model that are blocks and share no parameter with what is outside of them.

    A container that is never called (`nn.ModuleList`, `nn.ModuleDict`) cannot be a block; its members are instead.
    """

    def uses(module: nn.Module) -> Counter[nn.Parameter]:
        return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))

    everywhere, blocks, members = uses(model), [], set()
    for part in model.modules():  # a container before its members
        if part is model or not (part in members or is_block(part)):
            continue
        if type(part).forward is nn.Module.forward:
            members.update(part.children())
        elif all(everywhere[parameter] == inside for parameter, inside in uses(part).items()):
            blocks.append(part)
    return blocks
