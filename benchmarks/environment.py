"""What a figure was measured on: machine and versions, for the head of every results file."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from swaft.environment import package_versions

KERNELS = ("numba", "triton", "liger-kernel")
"""What figures depend on besides `swaft.environment.PACKAGES`."""


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """Processor, cores, GPU with its memory and capability (or None), and package versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": _card() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": package_versions() | {name: found for name in KERNELS if (found := version_of(name))},
    }


def _card() -> str:
    found = torch.cuda.get_device_properties()
    return f"{found.name}, {found.total_memory / 1e9:.0f} GB, capability {found.major}.{found.minor}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
