"""What a figure was measured on: machine and versions, for the head of every results file."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import swaft

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "safetensors",
    "triton",
)
"""Whose versions a figure depends on."""


def package_versions() -> dict[str, str]:
    """Versions of those that are installed, swaft's own first."""
    found = {"swaft": swaft.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
