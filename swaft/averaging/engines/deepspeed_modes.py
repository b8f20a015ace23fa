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


def refuse_modes(deepspeed_engine: Any) -> None:
    """Refuse a DeepSpeed engine whose masters cannot be averaged faithfully.

    Raises:
        UnsupportedEngineError: naming the setting.
    """
    wrapper = deepspeed_engine.optimizer
    refused = {
        "zero_optimization.zenflow (masters are re-derived from 16-bit weights)": (
            deepspeed_engine.zenflow_config() is not None
        ),
        "zero_optimization.offload_optimizer.super_offload": bool(deepspeed_engine.super_offload()),
        "bf16.bf16_master_weights_and_grads or fp16.fp16_master_weights_and_grads (masters of 16 bits)": (
            getattr(wrapper, "master_weights_and_grads_dtype", torch.float32) != torch.float32
        ),
        "zero_optimization.offload_optimizer.device=nvme": _on_nvme(
            deepspeed_engine.zero_offload_optimizer()
        ),
        "zero_optimization.offload_param.device=nvme": _on_nvme(deepspeed_engine.zero_offload_param()),
        "zero_optimization.zero_hpz_partition_size > 1": deepspeed_engine.zero_hpz_partition_size() > 1,
        "zero_optimization.zero_quantized_weights (an evaluation would see other weights than are exported)": (
            deepspeed_engine.zero_quantized_weights()
            or deepspeed_engine.zero_quantized_nontrainable_weights()
        ),
        "torch_autocast in fp16 (gradients are clipped at their scaled size)": (
            deepspeed_engine.torch_autocast_enabled()
            and deepspeed_engine.torch_autocast_dtype() == torch.float16
        ),
        "compile.deepcompile": bool(deepspeed_engine.is_deepcompile_enabled()),
        "optimizer.legacy_fusion": bool(getattr(wrapper, "fused_adam_legacy", False)),
        "hybrid_engine.enabled": type(deepspeed_engine).__name__ == "DeepSpeedHybridEngine",
        "pipeline parallelism (a PipelineModule)": bool(deepspeed_engine.pipeline_parallelism),
        "expert parallelism (MoE layers)": bool(deepspeed_engine.has_moe_layers),
        "tensor or sequence parallelism (tensor_parallel.autotp_size, or an mpu)": (
            deepspeed_engine.mpu is not None or _partitions_within_groups(wrapper)
        ),
    }
    for setting, present in refused.items():
        if present:
            raise UnsupportedEngineError(
                f"the DeepSpeed config sets {setting}, which this version does not average; turn it off, or "
                "train without averaging (averaging.rule=none)"
            )


def _on_nvme(offload_config: Any) -> bool:
    return offload_config is not None and offload_config.device == "nvme"


def _partitions_within_groups(wrapper: Any) -> bool:
    """Whether some parameters are partitioned over fewer ranks than train."""
    groups = getattr(wrapper, "real_dp_process_group", None) or getattr(
        wrapper, "sub_group_process_groups", []
    )
    return any(dist.get_world_size(group) != dist.get_world_size() for group in groups if group is not None)
