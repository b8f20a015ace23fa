"""Chooses the formulas of the engine that a launch line names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn

from swaft.config import TrainConfig
from swaft.errors import ConfigError
from swaft.planning.memory import (
    REST,
    EngineMemory,
    Phase,
    Run,
    fsdp2,
    numel,
    offloads,
    replicated,
    zero3,
    zero12,
)
from swaft.planning.step import FP32, Casting
from swaft.training.launch.accelerator import resolve_deepspeed, resolve_precision
from swaft.training.launch.fsdp2 import find_blocks, resolve_fsdp2
from swaft.training.launch.launcher import Launch

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNKNOWN = ("zenflow", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
"""Entries of ``zero_optimization`` whose memory is not known here."""
NOT_KNOWN = (
    "whose memory swaft plan does not know; leave it out, or train a few steps and read what they took"
)


class Engine:
    """What a launch line and a recipe's settings say of the engine.

    Args:
        launch: the launch line.
        train: section ``train``.
        hidden_size: width of the model, for DeepSpeed's bucket sizes.

    Raises:
        ConfigError: launcher, DeepSpeed file and recipe contradict one another, or ask for what cannot be planned.
    """

    def __init__(self, launch: Launch, train: TrainConfig, *, hidden_size: int | None):
        self.launch = launch
        self.precision = resolve_precision(train, launch.environ)
        self.dtype = DTYPES[self.precision]
        filled = resolve_deepspeed(train, launch.environ, precision=self.precision, hidden_size=hidden_size)
        self._config: Mapping[str, Any] = filled.config if filled else {}
        self.zero: Mapping[str, Any] = self._config.get("zero_optimization", {})
        self._refuse_unknown()

    @property
    def casting(self) -> Casting:
        """How the engine computes in 16 bits."""
        if self.precision == "no":
            return "none"
        return "weights" if self.launch.stage is not None or self.launch.engine == "FSDP2" else "autocast"

    @property
    def loads_whole(self) -> bool:
        """Whether every rank loads the whole model into host memory before the engine has it."""
        partitions = self.launch.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true"
        return not (partitions and self.launch.stage == 3)

    def blocks(self, model: nn.Module) -> list[int]:
        """Return which block FSDP2 gathers each parameter with, 0 for those in none; under other engines all 0."""
        numbers: dict[int, int] = {}
        if self.launch.engine == "FSDP2":
            for number, block in enumerate(find_blocks(model, self._plugin()), start=REST + 1):
                numbers |= {id(parameter): number for parameter in block.parameters()}
        return [numbers.get(id(parameter), REST) for parameter in model.parameters()]

    def offloads(self, part: Literal["optimizer", "param"]) -> bool:
        """Whether the fp32 masters (``optimizer``) or the slices of the weights (``param``) are in host memory."""
        return offloads(self.zero, part)

    def memory(self, run: Run) -> EngineMemory:
        """Return what the rank that holds most holds, phase by phase, the start among them."""
        if self.launch.stage in (1, 2):
            found = zero12(run, {"stage": self.launch.stage, **self.zero})
        elif self.launch.stage == 3:
            found = zero3(run, self.zero)
        elif self.launch.engine == "FSDP2":
            found = fsdp2(run, reshards=self._plugin().reshard_after_forward is not False)
        else:
            found = replicated(run, deepspeed=self.launch.stage == 0)
        loaded = {"model as loaded, fp32": FP32 * numel(run.step.weights)} if self.loads_whole else {}
        return EngineMemory([Phase("start", {}, loaded), *found.phases], owned=found.owned)

    def _plugin(self) -> FullyShardedDataParallelPlugin:
        """FSDP2's settings."""
        plugin = resolve_fsdp2(self.launch.environ, precision=self.precision)
        assert plugin is not None, "the engine is FSDP2"
        return plugin

    def _refuse_unknown(self) -> None:
        problems = [
            f"the DeepSpeed configuration sets zero_optimization.{name}, {NOT_KNOWN}"
            for name in UNKNOWN
            if self.zero.get(name) not in (None, False, 0, 1)
        ]
        for part in ("optimizer", "param"):
            if (self.zero.get(f"offload_{part}") or {}).get("device") == "nvme":
                problems.append(f"the DeepSpeed configuration offloads to nvme (offload_{part}), {NOT_KNOWN}")
        accumulates_in = (self._config.get("data_types") or {}).get("grad_accum_dtype")
        own = {"no": "fp32"}.get(self.precision, self.precision)
        if accumulates_in not in (None, own):
            problems.append(
                f"the DeepSpeed configuration sets data_types.grad_accum_dtype = {accumulates_in}, {NOT_KNOWN}"
            )
        if self.zero.get("contiguous_gradients", True) is not True:
            problems.append(
                f"the DeepSpeed configuration sets zero_optimization.contiguous_gradients = false, {NOT_KNOWN}"
            )
        if problems:
            raise ConfigError(problems)
