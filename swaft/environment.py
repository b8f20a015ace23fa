"""The software that a result or a bug depends on."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from swaft import __version__

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "peft", "numpy")


def software() -> dict[str, Any]:
    """Return the software in use: versions, operating system, commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git_commit": _git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of those packages that results or bugs depend on and that are installed."""
    versions = {"swaft": __version__}  # swaft may run from a source tree that is not installed
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit() -> str | None:
    """Return the commit of the source tree that swaft runs from, None if it is installed without one."""
    here = Path(__file__)
    # An environment may lie inside the working tree of another project, whose commit has no such file.
    command = ["git", "-C", str(here.parent), "rev-parse", "HEAD", f"HEAD:./{here.name}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        return None
