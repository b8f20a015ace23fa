"""Settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile(
    "swaft", deadline=None
)  # busy machines take their time; wrong answers are the fault
settings.load_profile("swaft")


@pytest.fixture
def launched_by_nothing(monkeypatch) -> None:
    """Be in the folder that launch files name their DeepSpeed files from, without the environment of a launch."""
    monkeypatch.chdir(Path(__file__).parents[1])
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what became of each type of model, where tests tried some."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    calls = [report for report in reports if getattr(report, "when", "") == "call"]
    rows = sorted(dict(report.user_properties)["type"] for report in calls if report.user_properties)
    if rows:
        terminalreporter.section("types of models")
    for recipe, name, outcome, *without_noise in rows:
        then = f"; noise.kind=none: {without_noise[0]}" if without_noise else ""
        terminalreporter.write_line(f"{recipe} {name}: {outcome}{then}")
    for outcome in ("trained", "refused"):
        if count := sum(row[2].startswith(outcome) for row in rows):
            terminalreporter.write_line(f"{count} of {len(rows)} types {outcome}")
