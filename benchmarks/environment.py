"""What a figure was measured on: machine and versions, for the head of every results file."""

from __future__ import annotations

import os
import platform

import torch

from swaft.training.run.folder import package_versions


def environment() -> dict[str, object]:
    """Processor, cores, GPU (or None) and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
