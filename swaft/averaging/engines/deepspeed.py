"""DeepSpeed: where each stage keeps its fp32 masters, and the modes whose "masters" are not true masters.

Based on DeepSpeed 0.19.8 (`stage_1_and_2.py`, `bf16_optimizer.py`, `stage3.py`). The public fragment mapping is not
used: with `round_robin_gradients` it points to the wrong parameters, and it is rebuilt at every load. The layout is
taken from the lists the buffers were made from, and proved bit for bit by :meth:`Engine.prove_layout`.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swaft.averaging.engines.base import Engine
from swaft.averaging.engines.replicated import ReplicatedEngine, optimized_fp32
from swaft.averaging.layout import Fragment
from swaft.errors import UnsupportedEngineError

DEEPSPEED_CALLS = (
    "save_checkpoint",
    "load_checkpoint",
    "save_16bit_model",
    "_zero3_consolidated_16bit_state_dict",  # which accelerate calls
)
"""Methods of a DeepSpeed engine that hand out or replace weights."""


def attach_deepspeed(deepspeed_engine: Any) -> Engine:
    """Return the adapter for a DeepSpeed engine, chosen by the wrapper around its optimizer (collective).

    Raises:
        UnsupportedEngineError: its masters cannot be averaged faithfully; names the setting.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    refuse_modes(deepspeed_engine)
    wrapper = deepspeed_engine.optimizer
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3Engine(deepspeed_engine)
    if type(wrapper) is DeepSpeedZeroOptimizer:
        return Zero12Engine(deepspeed_engine)
    if type(wrapper) is BF16_Optimizer:
        return Zero12Engine(deepspeed_engine, bf16_optimizer=True)
    masters = None
    if type(wrapper) is FP16_Optimizer:
        optimizer, parameters, masters = wrapper.optimizer, wrapper.fp16_groups, wrapper.fp32_groups_flat
    elif type(wrapper) is FP16_UnfusedOptimizer:
        optimizer = wrapper.optimizer
        parameters = [[parameter] for group in wrapper.fp16_groups for parameter in group]
        masters = [master for group in wrapper.fp32_groups for master in group]
    elif isinstance(wrapper, torch.optim.Optimizer):
        optimizer, parameters = wrapper, optimized_fp32(deepspeed_engine.module, [wrapper])
    else:
        raise UnsupportedEngineError(
            f"DeepSpeed trains with {type(wrapper).__name__}, whose masters this version does not average; use a "
            "torch optimizer (no `optimizer` block in the DeepSpeed config) or ZeRO stage 1, 2 or 3"
        )
    engine = ReplicatedEngine(
        "deepspeed-zero0",
        deepspeed_engine.module,
        [optimizer],
        parameters=parameters,
        masters=masters,
        steps_seen=partial(deepspeed_steps, deepspeed_engine),
    )
    engine.outer, engine.hands_out = deepspeed_engine, DEEPSPEED_CALLS
    return engine


class ZeroEngine(Engine):
    """Engines whose masters are a few flat partitions, one per parameter group or sub-group.

    DeepSpeed replaces the storage of these tensors when it loads a checkpoint, and frees it in `offload_states`, so
    they are fetched again each time.

    Args:
        name: name of the engine.
        deepspeed_engine: DeepSpeed's engine around the model.
        masters: attribute of its optimizer that lists the master partitions.
        working: attribute that lists the working weights: the same way, or one partition per rank (stages 1 and 2).
    """

    lends_storage = True
    hands_out = DEEPSPEED_CALLS

    def __init__(self, name: str, deepspeed_engine: Any, *, masters: str, working: str):
        steps = partial(deepspeed_steps, deepspeed_engine)
        super().__init__(name, deepspeed_engine.module, [deepspeed_engine.optimizer.optimizer], steps)
        self.outer = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self._list_of_masters, self._list_of_working = masters, working

    def masters(self) -> list[Tensor]:
        """The fp32 partitions that this rank's optimizer updates."""
        return [tensor.detach() for tensor in getattr(self._zero, self._list_of_masters)]


class Zero12Engine(ZeroEngine):
    """`DeepSpeedZeroOptimizer`, stage 1 or 2, and `BF16_Optimizer`: stage 1 in bf16 with gradients summed in fp32.

    A parameter group is flat, and cut into one partition per rank.
    """

    def __init__(self, deepspeed_engine: Any, *, bf16_optimizer: bool = False):
        zero = deepspeed_engine.optimizer
        if bf16_optimizer:
            name, self._flat = "deepspeed-zero1-bf16", "bf16_groups_flat"
            masters, working = "fp32_groups_flat_partition", "bf16_partitioned_groups"
            groups = zero.bf16_groups
            offsets = [[0, *accumulate(p.numel() for p in group)][:-1] for group in groups]
        else:
            stage = deepspeed_engine.zero_optimization_stage()
            name, self._flat = f"deepspeed-zero{stage}", "bit16_groups_flat"
            masters, working = "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups"
            groups, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
        super().__init__(name, deepspeed_engine, masters=masters, working=working)
        self.fragments = []
        for i, (group, places, master) in enumerate(zip(groups, offsets, self.masters(), strict=True)):
            first, length = self.ranks.rank * master.numel(), master.numel()
            for parameter, place in zip(group, places, strict=True):
                whole = Fragment(self.name_of(parameter), 0, parameter.numel(), i, place - first)
                self.fragments += whole.part(first - place, first + length - place)

    def working(self) -> list[Tensor]:
        """This rank's partitions of the flat working weights."""
        groups = getattr(self._zero, self._list_of_working)
        return [partitions[self.ranks.rank].detach() for partitions in groups]

    @torch.no_grad()
    def publish(self) -> None:
        """All-gather the flat groups, as DeepSpeed does after a step (collective)."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=getattr(self._zero, self._flat),
            partitioned_param_groups=getattr(self._zero, self._list_of_working),
            dp_process_group=self._zero.real_dp_process_group,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )


class Zero3Engine(ZeroEngine):
    """`DeepSpeedZeroOptimizer_Stage3`, optimizer and parameters on the device or in host memory.

    Every parameter of a sub-group is cut into one padded slice per rank. The padding is uninitialised memory; no
    fragment covers it, so it is neither averaged nor checked nor saved.
    """

    def __init__(self, deepspeed_engine: Any):
        masters, working = "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat"
        super().__init__("deepspeed-zero3", deepspeed_engine, masters=masters, working=working)
        self.fragments = []
        for i, sub_group in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in sub_group:
                numel = parameter.partition_numel()
                first = self.ranks.rank * numel
                whole = Fragment(self.name_of(parameter), 0, parameter.ds_numel, i, offset - first)
                self.fragments += whole.part(first, first + numel)
                offset += numel

    def working(self) -> list[Tensor]:
        """This rank's flat sub-groups of the working weights."""
        return [tensor.detach() for tensor in getattr(self._zero, self._list_of_working)]

    def publish(self) -> None:
        """Gather the always-resident small parameters again and drop node-local copies (collective)."""
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        self._zero.invalidate_secondary_tensor()

    def release_gathered(self) -> None:
        """Partition everything, so that no gathered copy of the weights survives a change of the shards."""
        self._zero.empty_partition_cache()

    def gather_working(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, as forwards see it, in host memory, on every rank (collective)."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]


def deepspeed_steps(deepspeed_engine: Any) -> int:
    """Steps DeepSpeed took, minus those it skipped; `was_step_applied` is stale between boundaries."""
    return deepspeed_engine.global_steps - deepspeed_engine.skipped_steps


def refused_settings(config: Any) -> list[str]:
    """Return the settings of a DeepSpeed configuration whose masters cannot be averaged faithfully.

    Args:
        config: a `deepspeed.runtime.config.DeepSpeedConfig`; no engine needs to exist yet.

    Returns:
        The names of the settings, with a reason where needed.
    """
    zero = config.zero_config
    optimizer, param = zero.offload_optimizer, zero.offload_param
    on_cpu = optimizer and optimizer.device == "cpu"
    experts = getattr(config, "expert_parallel_config", None)
    settings = {
        "zero_optimization.zenflow (masters are re-derived from 16-bit weights)": zero.zenflow is not None,
        "zero_optimization.offload_optimizer.super_offload": optimizer and optimizer.super_offload,
        "bf16.bf16_master_weights_and_grads or fp16.fp16_master_weights_and_grads (masters of 16 bits)": (
            config.bfloat16_config.bf16_master_weights_and_grads
            or config.float16_config.fp16_master_weights_and_grads
        ),
        "zero_optimization.offload_optimizer.device=nvme (use cpu)": optimizer and optimizer.device == "nvme",
        "zero_optimization.offload_optimizer.ratio < 1 (part of the masters stay on the device)": (
            zero.stage == 3 and on_cpu and optimizer.ratio < 1
        ),
        "zero_optimization.offload_param.device=nvme (use cpu)": param and param.device == "nvme",
        "zero_optimization.zero_hpz_partition_size > 1": zero.zero_hpz_partition_size > 1,
        "zero_optimization.zero_quantized_weights (an evaluation would see other weights than are exported)": (
            zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights
        ),
        "torch_autocast in fp16 (gradients are clipped at their scaled size)": (
            config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16
        ),
        "compile.deepcompile": config.compile_config.deepcompile,
        "hybrid_engine.enabled": config.hybrid_engine.enabled,
        "expert_parallel.enabled": experts and experts.enabled,
        "tensor_parallel.autotp_size > 1": config.tensor_parallel_config.autotp_size > 1,
    }
    return [setting for setting, present in settings.items() if present]


def refuse_modes(deepspeed_engine: Any) -> None:
    """Refuse a DeepSpeed engine whose masters cannot be averaged faithfully.

    Raises:
        UnsupportedEngineError: names the setting.
    """
    wrapper = deepspeed_engine.optimizer
    groups = getattr(wrapper, "real_dp_process_group", None) or getattr(
        wrapper, "sub_group_process_groups", []
    )
    sizes = {dist.get_world_size(group) for group in groups if group is not None}
    of_the_engine = {
        "optimizer.legacy_fusion": getattr(wrapper, "fused_adam_legacy", False),
        "hybrid_engine.enabled": type(deepspeed_engine).__name__ == "DeepSpeedHybridEngine",
        "pipeline parallelism (a PipelineModule)": deepspeed_engine.pipeline_parallelism,
        "expert parallelism (MoE layers)": deepspeed_engine.has_moe_layers,
        # With sequence parallelism, some parameters are partitioned over fewer ranks than train.
        "tensor or sequence parallelism (an mpu)": (
            deepspeed_engine.mpu is not None or sizes - {dist.get_world_size()}
        ),
    }
    found = [*refused_settings(deepspeed_engine._config), *(name for name, on in of_the_engine.items() if on)]
    if found:
        raise UnsupportedEngineError(
            f"the DeepSpeed config sets {found[0]}, which this version does not average; turn it off"
        )
