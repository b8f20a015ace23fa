"""What `import swaft` costs and offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

HEAVY = (
    "deepspeed",
    "numba",
    "triton",
    "sklearn",
    "scipy",
    "peft",
    "wandb",
    "tensorboard",
    "trackio",
    "matplotlib",
)


def test_importing_swaft_imports_nothing_optional():
    script = f"import sys, swaft; print([name for name in {HEAVY} if name in sys.modules])"
    # torch itself looks for Triton where it is installed, so a torch without swaft sets the mark.
    baseline = f"import sys, torch; print([name for name in {HEAVY} if name in sys.modules])"
    found, expected = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (script, baseline)
    )
    assert found == expected


def test_the_public_names_are_there():
    import swaft

    assert all(hasattr(swaft, name) for name in swaft.__all__)
