"""Two hosts on one machine: two network namespaces, joined by a cable that can be pulled.

Each has its own network stack, so ranks on different hosts really meet over an address and a port, and lose each
other as hosts do. Files and processors are shared.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

INTERFACE = "eth0"


def reason_not_to_try() -> str | None:
    """Why this machine cannot have two hosts, or None where it can."""
    if shutil.which("ip") is None:
        return "no `ip` (package iproute2), so no network namespaces"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"swaft{os.getpid()}try"
    tried = _ip("netns", "add", name)
    if tried.returncode == 0:
        tried = _ip("netns", "exec", name, "true")
        _ip("netns", "del", name)
    return f"`ip netns` is refused here: {tried.stderr.strip()}" if tried.returncode else None


class Job:
    """A command and all it starts, on one host."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Its exit code, at the latest after ``timeout_s``; then it is killed, and that is the error."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
            self._process.kill()
            raise AssertionError(f"no end after {timeout_s:.0f} s\n{self.output}") from None


class TwoHosts:
    """Context in which hosts 0 and 1 exist; what still runs on them afterwards is killed."""

    def __init__(self) -> None:
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self._names = tuple(f"swaft{os.getpid()}host{host}" for host in (0, 1))
        self._jobs: list[Job] = []

    def __enter__(self) -> TwoHosts:
        first, second = self._names
        for name in self._names:
            _must("netns", "add", name)
        cable = ("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE)
        _must(*cable, "netns", second)
        for name, address in zip(self._names, self.addresses, strict=True):
            _must("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _must("-n", name, "link", "set", "lo", "up")
            _must("-n", name, "link", "set", INTERFACE, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host, name in enumerate(self._names):
            self.power_off(host)
            _ip("netns", "del", name)

    def start(self, host: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Job:
        """Run a command on ``host``."""
        return Job(["ip", "netns", "exec", self._names[host], *command], environment, log)

    def pull_the_cable(self) -> None:
        """Cut the hosts off from each other; neither is told."""
        _must("-n", self._names[1], "link", "set", INTERFACE, "down")

    def power_off(self, host: int) -> None:
        """Kill every process of ``host``."""
        for process in _ip("netns", "pids", self._names[host]).stdout.split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


def _must(*words: str) -> None:
    done = _ip(*words)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
