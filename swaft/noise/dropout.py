"""Replay of torch's random state, so that two passes through a model draw the same dropout masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RngState:
    """The state of torch's global generators: the CPU's, and those of the accelerators a model lives on."""

    cpu: Tensor
    """The CPU generator's state, uint8."""
    accelerators: dict[torch.device, Tensor]
    """The state of each accelerator's generator, uint8."""

    @classmethod
    def capture(cls, model: nn.Module) -> RngState:
        """Take the state as it is now, on the CPU and on the accelerators that hold the model."""
        devices = {parameter.device for parameter in model.parameters()}
        return cls(
            cpu=torch.get_rng_state(),
            accelerators={
                device: torch.get_device_module(device).get_rng_state(device)
                for device in devices
                if device.type not in ("cpu", "meta")
            },
        )

    def restore(self) -> None:
        """Put the state back: what is drawn next is what was drawn after ``capture``."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
