"""A copy of launch/ among stand-ins for SLURM and accelerate, so that the scripts run as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES = ("gpu-a1.rack7", "x", "login_2")
JOB = {"SLURM_JOB_ID": "1234567", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "gpu-a1.rack7,x,login_2"}


class Cluster:
    """A folder with launch/ and a recipe, and the commands recorded that its scripts called."""

    def __init__(self, folder: Path):
        self.root = folder / "a project"
        self.record = folder / "record.jsonl"
        self._commands = folder / "bin"
        self._commands.mkdir()
        for name in ("srun", "scontrol", "scancel", "accelerate", "python"):
            command = self._commands / name
            stand_in = Path(__file__).with_name("stand_ins.py")
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{stand_in}" {name} "$@"\n')
            command.chmod(0o755)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        (self.root / "recipes").mkdir()
        (self.root / "recipes" / "classification.py").touch()

    def environment(self, nodes: int = 1, **more: str) -> dict[str, str]:
        """What a script sees in a job on so many nodes; none outside a job."""
        seen = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HF_"))}
        for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TOKENIZERS_PARALLELISM", "TMPDIR"):
            seen.pop(name, None)
        seen |= {"PATH": f"{self._commands}:/usr/bin:/bin", "RECORD": str(self.record)}
        if nodes:
            seen |= JOB | {"SLURM_NNODES": str(nodes), "NODES": " ".join(NODES[:nodes])}
            seen |= {"SLURM_SUBMIT_DIR": str(self.root)}
        return seen | more

    def run(
        self, script: str, *words: str, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/ to its end, from elsewhere."""
        command = ["bash", str(self.root / "launch" / script), *words]
        return subprocess.run(
            command, env=dict(environment), cwd="/", capture_output=True, text=True, timeout=60
        )

    def start(self, script: str, *words: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a script of launch/."""
        command = ["bash", str(self.root / "launch" / script), *words]
        return subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def calls(self, name: str) -> list[dict]:
        """The calls of a command so far: its words, environment and process id."""
        if not self.record.exists():
            return []
        return [
            call for call in map(json.loads, self.record.read_text().splitlines()) if call["name"] == name
        ]


def value_of(option: str, words: list[str]) -> str:
    """The word after ``option``."""
    return words[words.index(option) + 1]
