"""A state of the averages opens under every engine and any number of ranks, whichever wrote it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from harness import faults, start_ranks

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "state_worker.py"
COVER = ("ddp bf16", "zero1 bf16", "zero2 bf16, round robin", "zero3 bf16", "fsdp2 bf16")
ALL = (
    *COVER, "ddp fp32", "zero0 bf16", "zero1 bf16, fp32 accumulation", "zero2 fp32",
    "zero2 bf16, round robin, aligned", "zero2 bf16, optimizer offload", "zero3 fp32",
    "zero3 bf16, nothing resident, small sub-groups", "zero3 bf16, optimizer and parameter offload", "fsdp2 fp32",
)  # fmt: skip


def check(
    tmp_path: Path, monkeypatch, engines: tuple[str, ...], saved_by: tuple[int, ...], opened_by
) -> None:
    states = tmp_path / "states"
    states.mkdir()
    monkeypatch.setenv("SWAFT_TEST_STATES", str(states))
    for ranks, kind in [*product(saved_by, ["save"]), *product(opened_by, ["load"])]:
        cases = [f"{kind} / {engine}" for engine in engines]
        results = tmp_path / f"{kind}-{ranks}.json"
        findings = start_ranks(WORKER, results, ranks=ranks, cases=cases, timeout_s=1400)
        checks = 2 if kind == "save" else 2 * len(engines) * len(saved_by)
        assert not "".join(faults(findings, case, checks=checks) for case in cases)


@pytest.mark.timeout(600)
def test_a_state_of_two_ranks_opens_under_every_kind_of_engine(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, COVER, (2,), (2,))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("model", ["bert", "tied", "lora", "uneven"])
def test_a_state_opens_by_any_number_of_ranks(tmp_path, monkeypatch, model):
    monkeypatch.setenv("SWAFT_TEST_MODEL", model)
    engines = ALL if model == "uneven" else COVER
    check(tmp_path, monkeypatch, engines, (1, 2, 4), (1, 2, 3))
