"""What `import swaft` costs and offers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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


INTEGRATIONS = ("NoiseCallback", "WeightAveragingCallback", "averaged_weights", "register_averager")
"""What needs the project that it is for."""


def test_importing_swaft_imports_nothing_optional():
    names = f"[getattr(swaft, name) for name in swaft.__all__ if name not in {INTEGRATIONS}]"
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


NAMES = """
import ast, re, sys
from pathlib import Path
import swaft

for path in Path(swaft.__file__).parent.rglob("*.py"):
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("Error", "logger.warning", "._warn")):
            said = "".join(str(n.value) for n in ast.walk(call) if isinstance(n, ast.Constant))
            said = re.sub(r"-m swaft\\S+", "", said)  # a module to be run
            for name in re.findall(r"\\bswaft(?:\\.[a-z_]\\w*)+|\\baverager\\.\\w+", said):
                owner, *parts = name.split(".")
                found = swaft if owner == "swaft" else swaft.WeightAverager
                for part in parts:
                    found = getattr(found, part, "engine" if part == "engine" else None)
                print(path.name, name, found is not None)
"""


def test_every_call_that_an_error_names_exists_after_importing_swaft_alone():
    found = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=True).stdout
    lines = found.splitlines()
    assert not [line for line in lines if line.endswith("False")]
    assert {"averager.update_bn", "swaft.averaging.save_pretrained"} <= {line.split()[1] for line in lines}


def test_the_version_is_known_without_an_installation():
    script = (
        "import importlib.metadata as m, sys\n"
        "def refuse(*_): raise m.PackageNotFoundError\n"
        "m.version = m.distribution = refuse\n"
        "import swaft; print(swaft.__version__, 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+ False\n", found)


def test_the_public_names_are_there_and_no_others():
    import swaft

    assert all(hasattr(swaft, name) for name in swaft.__all__)
    with pytest.raises(AttributeError, match="'swaft' has no attribute 'SWAG'"):
        swaft.SWAG  # noqa: B018


BLOCKED = """
import sys

sys.modules |= dict.fromkeys("accelerate datasets deepspeed omegaconf peft transformers".split())
"""

ALONE = f"""{BLOCKED}
import tempfile
import torch
import swaft

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=4)
members = []
for step in range(4):
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    averager.step()
    members += [model.weight.detach().double()] if step >= 1 else []
with averager.swapped_in():
    averaged = model.weight.detach().clone()
torch.testing.assert_close(averaged.double(), sum(members) / 3, rtol=0, atol=1e-7)
state = tempfile.mkdtemp() + "/state"
averager.save_state(state)
averager.load_state(state)
with averager.swapped_in():
    assert torch.equal(model.weight, averaged)
import swaft.soup
from swaft.cli.main import main
assert main(["env"]) == 0
[getattr(swaft, name) for name in swaft.__all__ if name not in {INTEGRATIONS}]
"""


def test_the_library_trains_averages_swaps_and_saves_without_what_recipes_need():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EXPORTED = f"""{ALONE}
from safetensors.torch import save_file
from swaft.cli.main import main

base = tempfile.mkdtemp()
open(base + "/config.json", "w").write("{{}}")
save_file(model.state_dict(), base + "/model.safetensors")
averager.save_state(base + "/averages")
sys.exit(main(["export", base, "--output", tempfile.mkdtemp() + "/out"]))
"""


def test_a_checkpoint_is_exported_without_what_recipes_need():
    done = subprocess.run([sys.executable, "-c", EXPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["validate", "plan", "report"])
def test_the_help_of_a_command_needs_nothing_that_recipes_need(command):
    script = f"{BLOCKED}\nfrom swaft.cli.main import main\nsys.exit(main([{command!r}, '--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"swaft {command} " in done.stdout


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_command_that_needs_the_recipes_says_how_to_install_them(command):
    script = f"{BLOCKED}\nfrom swaft.cli.main import main\nsys.exit(main([{command!r}, 'recipe.py']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: swaft {command} needs ")
    assert "pip install 'swaft[recipes]'" in done.stderr


def test_a_recipe_says_how_to_install_what_it_needs():
    recipe = Path(__file__).parents[1] / "recipes" / "classification.py"
    script = f"{BLOCKED}\nimport runpy\nrunpy.run_path({str(recipe)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'swaft[recipes]'" in done.stderr.splitlines()[-1]
