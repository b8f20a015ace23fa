"""Prints the lowest versions that pyproject.toml allows, as constraints for pip: `make test-versions`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

LOWEST = re.compile(r"^([A-Za-z0-9_.-]+)\s*(?:>=|==)\s*([0-9.]+)")
"""Name and lowest version of a requirement; one without a lower bound is left to pip."""


def lowest_versions() -> list[str]:
    """Return `name==version` for each requirement of the package and of its extras."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    found = [
        LOWEST.match(each) for each in (*project["dependencies"], *(each for some in extras for each in some))
    ]
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(lowest_versions()))
