"""Chooses the formulas of the engine that a launch line names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.training.launch.accelerator import EngineSettings, partitions_at_load
from swaft.training.launch.fsdp2 import find_blocks
from swaft.training.launch.launcher import Launch
from swaft.training.planning.memory import (
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
from swaft.training.planning.step import FP32, Casting

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_KNOWN = (
    "whose memory swaft plan does not know; leave it out, or train a few steps and read what they took"
)


class Engine:
    """What a launch line and a recipe's settings say of the engine.

    Args:
        launch: the launch line.
        settings: what that line, its files and the recipe come to.

    Raises:
        ConfigError: they ask for what cannot be planned.
    """

    def __init__(self, launch: Launch, settings: EngineSettings):
        self.launch = launch
        self.precision = settings.precision
        self.dtype = DTYPES[self.precision]
        self._fsdp2 = settings.fsdp2
        self._config: Mapping[str, Any] = settings.deepspeed.config if settings.deepspeed else {}
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
        return self.launch.stage is None or not partitions_at_load(self.launch.environ, self._config)

    def blocks(self, model: nn.Module) -> list[int]:
        """Return which block FSDP2 gathers each parameter with, 0 for those in none; under other engines all 0."""
        numbers: dict[int, int] = {}
        if self._fsdp2 is not None:
            for number, block in enumerate(find_blocks(model, self._fsdp2), start=REST + 1):
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
        elif self._fsdp2 is not None:
            found = fsdp2(run, reshards=self._fsdp2.reshard_after_forward is not False)
        else:
            found = replicated(run, deepspeed=self.launch.stage == 0)
        loaded = {"model as loaded, fp32": FP32 * numel(run.step.weights)} if self.loads_whole else {}
        return EngineMemory([Phase("start", {}, loaded), *found.phases], owned=found.owned)

    def _refuse_unknown(self) -> None:
        problems = []
        if self.zero.get("zero_quantized_gradients"):
            problems.append(
                f"the DeepSpeed configuration sets zero_optimization.zero_quantized_gradients, {NOT_KNOWN}"
            )
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
