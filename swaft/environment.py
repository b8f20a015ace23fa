"""The software that a result or a bug depends on, and whether GPU kernels can be compiled."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sysconfig
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from swaft import __version__

logger = logging.getLogger(__name__)

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


@cache
def has_triton() -> bool:
    """Whether GPU kernels can be compiled here; without Triton, plain operations give the same.

    Triton also compiles code for the host, which needs a C compiler and Python's headers.
    """
    if find_spec("triton") is None:
        return False
    compiler = any(map(which, filter(None, (os.environ.get("CC"), "gcc", "clang"))))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not (compiler and headers):
        what = "Python's headers (python3-dev)" if compiler else "a C compiler (gcc, or one that CC names)"
        logger.warning(
            "noise and losses are computed by plain operations, which is slower: Triton needs %s", what
        )
    return compiler and headers


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
