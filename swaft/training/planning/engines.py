"""Chooses the formulas of the engine that a launch line names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from swaft.errors import ConfigError
from swaft.training.launch.accelerator import EngineSettings, partitions_at_load
from swaft.training.launch.fsdp2 import find_blocks
from swaft.training.launch.launcher import Launch
from swaft.training.planning import memory
from swaft.training.planning.step import FP32, Activations, Weight

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlannedEngine:
    """What a launch line and a recipe's settings say of the engine.

    Args:
        launch: the launch line.
        settings: what that line, its files and the recipe come to.
        on_cpu: whether the ranks compute on the host; else on a GPU each.

    Raises:
        ConfigError: they ask for what cannot be planned.
    """

    def __init__(self, launch: Launch, settings: EngineSettings, *, on_cpu: bool):
        self.launch, self.on_cpu, self._fsdp2 = launch, on_cpu, settings.fsdp2
        self.precision, self.dtype = settings.precision, DTYPES[settings.precision]
        self.casting: Literal["none", "autocast", "weights"] = "autocast"
        """How 16 bits are computed in: not at all, by autocast over fp32 weights, by weights cast beforehand."""
        if self.precision == "no":
            self.casting = "none"
        elif launch.stage is not None or launch.engine == "FSDP2":
            self.casting = "weights"
        self.loads_whole = True
        """Whether every rank loads the whole model into host memory before the engine has it."""
        self._zero: Any = None
        if settings.deepspeed is not None:
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # only here: takes seconds

            config = settings.deepspeed.config
            self.loads_whole = not partitions_at_load(launch.environ, config)
            self._zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
            self._refuse_unknown(config)

    def blocks(self, model: nn.Module) -> list[int]:
        """Return which block FSDP2 gathers each parameter with, 0 for those in none; under other engines all 0."""
        numbers: dict[int, int] = {}
        if self._fsdp2 is not None:
            for number, block in enumerate(find_blocks(model, self._fsdp2), start=memory.REST + 1):
                numbers |= {id(parameter): number for parameter in block.parameters()}
        return [numbers.get(id(parameter), memory.REST) for parameter in model.parameters()]

    def offloads(self, part: Literal["optimizer", "param"]) -> bool:
        """Whether the fp32 masters (``optimizer``) or the slices of the weights (``param``) are in host memory."""
        return self._zero is not None and memory.offloads(self._zero, part)

    def memory(
        self, weights: Sequence[Weight], activations: Activations, *, accumulates: bool
    ) -> memory.EngineMemory:
        """Return what the rank that holds most holds, phase by phase, the start among them."""
        stage = self.launch.stage
        run = memory.PlannedRun(
            weights=weights,
            activations=activations,
            world_size=self.launch.world_size,
            on_cpu=self.on_cpu,
            accumulates=accumulates,
        )
        if stage in (1, 2):
            found = memory.zero12(run, self._zero)
        elif stage == 3:
            found = memory.zero3(run, self._zero)
        elif self._fsdp2 is not None:
            found = memory.fsdp2(run, reshards=self._fsdp2.reshard_after_forward is not False)
        else:
            found = memory.replicated(run, deepspeed=stage == 0)
        loaded = {"model as loaded, fp32": FP32 * memory.numel(weights)} if self.loads_whole else {}
        return memory.EngineMemory([memory.Phase("start", {}, loaded), *found.phases], owned=found.owned)

    def _refuse_unknown(self, config: Any) -> None:
        own = {"no": "fp32"}.get(self.precision, self.precision)
        sums_in = (config.get("data_types") or {}).get("grad_accum_dtype") or own
        unknown = {
            "zero_optimization.zero_quantized_gradients": self._zero.zero_quantized_gradients,
            f"data_types.grad_accum_dtype = {sums_in}": sums_in != own,
            "zero_optimization.contiguous_gradients = false": not self._zero.contiguous_gradients,
        }
        problems = [
            f"the DeepSpeed configuration sets {name}, whose memory swaft plan does not know; leave it out, or "
            "train a few steps and read what they took"
            for name, is_set in unknown.items()
            if is_set
        ]
        if problems:
            raise ConfigError(problems)
