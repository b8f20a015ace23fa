"""The modes of DeepSpeed in which a "master" is not what it says, or that nobody has tried with averaging."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from swaft.errors import UnsupportedEngineError

DEEPSPEED_CALLS = (
    *("save_checkpoint", "load_checkpoint", "save_16bit_model"),
    "_zero3_consolidated_16bit_state_dict",  # which accelerate calls
)
"""Calls of a DeepSpeed engine that hand out weights or replace them."""


def deepspeed_steps(deepspeed_engine: Any) -> int:
    """Steps DeepSpeed took less those it skipped; `was_step_applied` is stale between boundaries."""
    return deepspeed_engine.global_steps - deepspeed_engine.skipped_steps


def refused_settings(config: Any) -> list[str]:
    """Return the settings of a DeepSpeed configuration whose masters cannot be averaged faithfully.

    Args:
        config: a `deepspeed.runtime.config.DeepSpeedConfig`; no engine need run yet.

    Returns:
        The names of the settings, each with the reason where it needs one.
    """
    zero = config.zero_config
    optimizer, param = zero.offload_optimizer, zero.offload_param
    settings = {
        "zero_optimization.zenflow (masters are re-derived from 16-bit weights)": zero.zenflow is not None,
        "zero_optimization.offload_optimizer.super_offload": optimizer is not None
        and optimizer.super_offload,
        "bf16.bf16_master_weights_and_grads or fp16.fp16_master_weights_and_grads (masters of 16 bits)": (
            config.bfloat16_config.bf16_master_weights_and_grads
            or config.float16_config.fp16_master_weights_and_grads
        ),
        "zero_optimization.offload_optimizer.device=nvme (use cpu)": optimizer is not None
        and optimizer.device == "nvme",
        "zero_optimization.offload_optimizer.ratio < 1 (part of the masters stay on the device)": zero.stage
        == 3
        and optimizer is not None
        and optimizer.device == "cpu"
        and optimizer.ratio < 1,
        "zero_optimization.offload_param.device=nvme (use cpu)": param is not None and param.device == "nvme",
        "zero_optimization.zero_hpz_partition_size > 1": zero.zero_hpz_partition_size > 1,
        "zero_optimization.zero_quantized_weights (an evaluation would see other weights than are exported)": (
            zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights
        ),
        "torch_autocast in fp16 (gradients are clipped at their scaled size)": (
            config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16
        ),
        "compile.deepcompile": config.compile_config.deepcompile,
        "hybrid_engine.enabled": config.hybrid_engine.enabled,
        "expert_parallel.enabled": getattr(config, "expert_parallel_config", None)
        and config.expert_parallel_config.enabled,
        "tensor_parallel.autotp_size > 1": config.tensor_parallel_config.autotp_size > 1,
    }
    return [setting for setting, present in settings.items() if present]


def refuse_modes(deepspeed_engine: Any) -> None:
    """Refuse a DeepSpeed engine whose masters cannot be averaged faithfully.

    Raises:
        UnsupportedEngineError: naming the setting.
    """
    wrapper = deepspeed_engine.optimizer
    of_the_engine = {
        "optimizer.legacy_fusion": bool(getattr(wrapper, "fused_adam_legacy", False)),
        "hybrid_engine.enabled": type(deepspeed_engine).__name__ == "DeepSpeedHybridEngine",
        "pipeline parallelism (a PipelineModule)": bool(deepspeed_engine.pipeline_parallelism),
        "expert parallelism (MoE layers)": bool(deepspeed_engine.has_moe_layers),
        "tensor or sequence parallelism (an mpu)": (
            deepspeed_engine.mpu is not None or _partitions_within_groups(wrapper)
        ),
    }
    found = [*refused_settings(deepspeed_engine._config), *(name for name, on in of_the_engine.items() if on)]
    if found:
        raise UnsupportedEngineError(
            f"the DeepSpeed config sets {found[0]}, which this version does not average; turn it off"
        )


def _partitions_within_groups(wrapper: Any) -> bool:
    """Whether some parameters are partitioned over fewer ranks than train."""
    groups = getattr(wrapper, "real_dp_process_group", None) or getattr(
        wrapper, "sub_group_process_groups", []
    )
    return any(dist.get_world_size(group) != dist.get_world_size() for group in groups if group is not None)
