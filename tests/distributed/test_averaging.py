"""Weight averaging on real ranks: every engine, a model of each kind under each kind of engine.

The whole matrix is in `test_matrix.py`; this is the part of it that meets every pair of an engine and a precision,
and of a kind of engine and a model, on two ranks.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import faults, run_ranks, start_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]

HERE = Path(__file__).parent
TORCH = [
    *("ddp fp32 / bert", "ddp fp32 / tied", "ddp bf16 / lora", "ddp bf16 / uneven"),
    *("fsdp2 fp32 / bert", "fsdp2 fp32 / lora", "fsdp2 bf16 / bert", "fsdp2 bf16, root resharded / uneven"),
    *(
        "fsdp2 fp32, nothing resharded / tied",
        "fsdp2 bf16, offload / lora",
        "fsdp2 fp32, by accelerate / tied",
    ),
]
ZERO_012 = [
    *("zero0 fp32 / uneven", "zero0 bf16 / bert", "zero0 bf16 / lora", "zero0 bf16, fused / tied"),
    *("zero1 fp32 / lora", "zero1 bf16 / tied", "zero1 bf16, fp32 accumulation / bert"),
    *(
        "zero1 bf16, fp32 accumulation / uneven",
        "zero2 fp32 / tied",
        "zero2 bf16 / bert",
        "zero2 bf16 / lora",
    ),
    *("zero2 bf16, round robin / bert", "zero2 bf16, round robin, aligned / uneven"),
    "zero2 bf16, optimizer offload / bert",
]
ZERO_3 = [
    *("zero3 fp32 / uneven", "zero3 bf16 / bert", "zero3 bf16 / lora", "zero3 bf16, some resident / bert"),
    *("zero3 bf16, nothing resident, small sub-groups / bert", "zero3 bf16, optimizer offload / tied"),
    *("zero3 bf16, optimizer and parameter offload / bert", "zero3 bf16 / prompt"),
]
THREE_RANKS = ["zero2 bf16 / uneven", "zero3 bf16 / uneven", "fsdp2 bf16 / uneven"]
MORE_ON_THREE_RANKS = [
    *("ddp fp32 / uneven", "zero0 bf16, fused / uneven", "zero1 bf16 / uneven", "fsdp2 fp32 / uneven"),
]
FOUR_RANKS = ["fsdp2 fp32, replicated / uneven", "fsdp2 bf16, replicated, offload / bert"]
STARTS = {
    "torch": (2, TORCH),
    "zero 0 1 2": (2, ZERO_012),
    "zero 3": (2, ZERO_3),
    "3 ranks": (3, THREE_RANKS),
    "more on 3 ranks": (3, MORE_ON_THREE_RANKS),
    "2 x 2 ranks": (4, FOUR_RANKS),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The findings of a start of ranks, by its name; each start is made when it is first asked for."""
    made: dict[str, dict[str, str]] = {}

    def of(start: str) -> dict[str, str]:
        if start not in made:
            ranks, cases = STARTS[start]
            results = tmp_path_factory.mktemp("ranks") / "findings.json"
            made[start] = start_ranks(
                HERE / "averaging_worker.py", results, ranks=ranks, cases=cases, timeout_s=400
            )
        return made[start]

    return of


@pytest.mark.parametrize(
    ("start", "case"),
    [
        pytest.param(start, case, marks=[pytest.mark.slow] if start == "more on 3 ranks" else [])
        for start, (_, cases) in STARTS.items()
        for case in cases
    ],
)
def test_every_promise_holds_under_this_engine(start, case, findings):
    assert not faults(findings(start), case, checks=15)


@pytest.fixture(scope="module")
def situations(tmp_path_factory) -> dict[str, str]:
    results = tmp_path_factory.mktemp("ranks") / "findings.json"
    return start_ranks(HERE / "situations_worker.py", results, timeout_s=400)


@pytest.mark.parametrize(
    ("case", "checks"),
    [
        ("counting", 14),
        ("offloaded states", 4),
        ("compiled", 8),
        ("gathered root", 2),
        ("generation", 4),
        ("changed parameters", 9),
        ("buffers", 14),
    ],
)
def test_averaging_goes_on_or_says_why_not(case, checks, situations):
    assert not faults(situations, case, checks=checks)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, str]:
    results = tmp_path_factory.mktemp("ranks") / "findings.json"
    return start_ranks(HERE / "refusal_worker.py", results)


@pytest.mark.parametrize(("case", "checks"), [("torch", 10), ("stand-ins", 5), ("deepspeed", 10)])
def test_doubtful_masters_are_refused_before_training(case, checks, refusals):
    assert not faults(refusals, case, checks=checks)


def test_an_error_on_one_rank_inside_a_swap_ends_the_run_instead_of_hanging_it():
    started = time.monotonic()
    returncode, output = run_ranks([HERE / "lonely_error_worker.py"], timeout_s=120)
    assert returncode != 0
    assert "evaluation broke on this rank alone" in output
    assert "the live weights are not restored" in output
    assert time.monotonic() - started < 90
