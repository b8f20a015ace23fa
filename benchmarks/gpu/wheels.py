"""Packages for a machine with a card but no pip: collected where pip works, unpacked there.

python -m benchmarks.gpu.wheels FOLDER --python 3.12      # needs torch here, for DeepSpeed's build
python3 -m benchmarks.gpu --wheels FOLDER                 # on the card's machine
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARY = (
    *("hjson", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("omegaconf", "liger-kernel"),
)
"""What such a machine lacks besides DeepSpeed, which is distributed only as source."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def collect(folder: Path, python: str) -> None:
    """Download the wheels at the tested versions, and build DeepSpeed's without its compiled parts.

    Args:
        folder: created if missing.
        python: version on the card's machine, such as ``3.12``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    target = [word for platform in PLATFORMS for word in ("--platform", platform)]
    chosen = [
        "--no-deps",
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        python,
        *target,
    ]
    subprocess.run([*pip, "download", "-q", *chosen, "-d", folder, *map(pinned, BINARY)], check=True)
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, pinned("deepspeed")]
    subprocess.run(build, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})


def pinned(package: str) -> str:
    """Return the package with its version from constraints.txt, in pip's form."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name.lower().replace("_", "-") == package.lower().replace("_", "-"):
            return f"{package}=={version}"
    return package


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpack every wheel of a folder; return their names.

    Args:
        folder: folder of the wheels.
        into: folder to put on Python's path.

    Raises:
        FileNotFoundError: there is no wheel.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder} holds no wheel; expected those of python -m benchmarks.gpu.wheels")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    return [wheel.name for wheel in wheels]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    given = parser.parse_args()
    collect(given.folder, given.python)
