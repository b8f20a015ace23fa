"""Prints versions and the machine's hardware, for a bug report.

    swaft env [--json]

The versions are also in env.json of every run folder, with device, ranks and engine of that run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from swaft.cli import CommandParser


def run(words: Sequence[str]) -> int:
    """Print the environment and return the exit code."""
    parser = CommandParser("env")
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args(list(words)).json

    from swaft.environment import software  # here, so that --help does not wait for it

    facts = software() | machine()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        print(f"{name:<12} {text}")
    return 0


def machine() -> dict[str, Any]:
    """Return this machine's processors, memory in bytes, and GPUs by name."""
    import psutil
    import torch

    from swaft.averaging.host.machine import allowed_cores

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total
    return {"cpus": len(allowed_cores()), "memory_bytes": memory, "gpus": gpus}
