"""FSDP2 as the launcher asked for it, done here where accelerate 1.15 would silently train wrongly.

The launcher's file says what to shard and how; three things are done differently from
`accelerate/utils/fsdp_utils.py` and `accelerate/state.py`:

* accelerate shards the token embedding and the head separately from the rest. A tied pair that a third module
  shares too, such as the encoder of a T5, is untied, and one of the copies is in no optimizer; an embedding
  inside a block that is sharded as one, such as BERT's, is sharded twice and fails. Here blocks are sharded one
  by one, and everything outside them together, so that tied weights stay tied.
* accelerate sums gradients over ranks, and returns the model's outputs, in the format that the model computes in.
* Without CUDA accelerate never reads the plugin and starts DDP. Everything it does later (accumulation, clipping)
  depends on its state, so the state is set as it would have been on GPUs.
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
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "fsdp_activation_checkpointing_offload: nothing is offloaded",
}
"""Options of a launcher's file that are met in another way with the same weights: variable, and how."""


def uses_fsdp(environ: Mapping[str, str]) -> bool:
    """Whether the launcher asked for FSDP."""
    return environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def obey_fsdp2(environ: Mapping[str, str], train: TrainConfig) -> None:
    """Take over the FSDP2 options of the launcher's file that the recipe implements itself, and log how.

    Args:
        environ: environment variables set by the launcher.
        train: section ``train``; its ``gradient_checkpointing`` is switched on if the launcher wants that.
    """
    if not uses_fsdp(environ):
        return
    for name, how in OBEYED_OTHERWISE.items():
        if _is_on(environ, name):
            logger.info("%s", how)
            train.gradient_checkpointing |= name == "FSDP_ACTIVATION_CHECKPOINTING"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() not in ("false", "")


def resolve_fsdp2(environ: Mapping[str, str], *, precision: str) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's plugin for FSDP2, or None if the launcher did not ask for FSDP.

    Weights and the sums of gradients, over micro-batches and over ranks, are fp32. Forward and backward
    compute in ``precision``; a loss that the model computes in fp32 stays fp32.

    Raises:
        ConfigError: the launcher asks for FSDP1, or for something that would make weights differ between ranks.
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
            "the launcher asks for fsdp_ignored_modules: every rank would train those weights separately; remove it"
        )
    computes_in = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # Inputs of a block are not cast, as under DeepSpeed: noise may be too small for 16 bits.
    policy = MixedPrecisionPolicy(computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = {name: value for name, value in environ.items() if name.startswith("FSDP_")}
    try:
        # accelerate reads the rest from the environment.
        with patch_environment(**settings | dict.fromkeys(OBEYED_OTHERWISE, "false")):
            return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    except ValueError as error:
        raise ConfigError(f"the launcher's fsdp_config: {error}") from error


def start_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make an accelerator that started ranks without CUDA work like one that started with FSDP2."""
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning needs a device
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loader: DataLoader[Any],
) -> tuple[nn.Module, Any, DataLoader[Any]]:
    """Hand model, optimizer and loader to the engine, and return them as ``accelerator.prepare`` does (collective).

    Args:
        accelerator: nothing prepared yet.
        model: on the host, the same on every rank.
        build_optimizer: makes the optimizer for a model's parameters.
        loader: training batches.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(model, build_optimizer(model), loader)
    shard(model, accelerator.state.fsdp_plugin)  # type: ignore[arg-type]
    # The optimizer comes after: sharding replaces the model's parameters.
    optimizer = accelerator.prepare_optimizer(build_optimizer(model))
    return model, optimizer, accelerator.prepare_data_loader(loader)


def shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Cut a model's parameters into rows over all ranks, in place (collective).

    Every block that the launcher's policy names is gathered separately, and the rest together with the model. A
    block with a parameter that is tied to one elsewhere belongs to the rest.

    Args:
        model: on the host, the same on every rank.
        plugin: from `resolve_fsdp2`.

    Raises:
        TrainingError: a trainable parameter is left whole, so that ranks would train it separately.
    """
    settings: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy,
        "offload_policy": plugin.cpu_offload,
    }
    blocks = find_blocks(model, plugin)
    if not blocks:
        logger.warning(
            "FSDP2 found no blocks to shard one by one, so all weights are gathered for every pass; list the "
            "classes of the model's layers in fsdp_transformer_layer_cls_to_wrap of the accelerate configuration"
        )
    for block in reversed(blocks):  # the inner ones first
        fully_shard(block, reshard_after_forward=bool(plugin.reshard_after_forward), **settings)
    fully_shard(model, **settings)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise TrainingError(
                f"{name!r} is whole although the launcher asked for FSDP2, so the ranks would train it separately; "
                "train this model under DDP or DeepSpeed"
            )


def find_blocks(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """Return the modules of a model, real or without data, that are gathered one by one, outer ones first.

    Raises:
        ConfigError: the launcher names a layer class that the model does not have.
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
    """Return the modules of a model that are blocks and share no parameter with anything outside them.

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
