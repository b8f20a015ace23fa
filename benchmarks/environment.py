"""What a figure was measured on: machine and versions, for the head of every results file."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

PACKAGES = ("swaft", "torch", "accelerate", "transformers", "datasets", "deepspeed", "numpy")


def environment() -> dict[str, object]:
    """Processor, cores, GPU (or None) and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
