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
    names = "[getattr(swaft, name) for name in swaft.__all__]"
    script = f"import sys, swaft; {names}; print([name for name in {HEAVY} if name in sys.modules])"
    # torch itself looks for Triton where it is installed, so a torch without swaft sets the mark.
    baseline = f"import sys, torch; print([name for name in {HEAVY} if name in sys.modules])"
    found, expected = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (script, baseline)
    )
    assert found == expected


def test_swaft_alone_does_not_wait_for_torch():
    script = "import sys, swaft; print('torch' in sys.modules, {*swaft.__all__} <= {*dir(swaft)})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert found == "False True\n"


def test_the_public_names_are_there_and_no_others():
    import swaft

    assert all(hasattr(swaft, name) for name in swaft.__all__)
    with pytest.raises(AttributeError, match="'swaft' has no attribute 'SWAG'"):
        swaft.SWAG  # noqa: B018
