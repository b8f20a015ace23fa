"""The page that is drawn from rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import arms, evidence, grid
from benchmarks.study.cell import Cell
from benchmarks.study.default import QUOTE, best_arm, differences, quote
from benchmarks.study.readouts import rules_for
from benchmarks.study.store import read_rows
from benchmarks.study.trainings import TEACHER_RATES, TRAININGS
from swaft.averaging.rules import RECOMMENDED

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


def row(arm: str, task: str, seed: int, nll: float, accuracy: float, **fields) -> dict:
    training, readout = arm.split(":")
    cell = Cell(task, training, "main", 1e-4, seed, "test")
    numbers = {
        "nll": nll,
        "accuracy": accuracy,
        "nll_scaled": nll,
        "ece": 0.1,
        "mcc": accuracy,
        "f1": accuracy,
    }
    return {
        "cell": cell.name, "task": task, "arm": arm, "training": training, "readout": readout, "regime": "main",
        "rate": 1e-4, "seed": seed, "split": "test", "fingerprint": training,
        "machine": {"processor": "p", "torch": "t"},
        "of": 1, "outcomes": numbers, "cost": {"cpu_seconds": 1.0, "peak_bytes": 1e9}, **fields,
    }  # fmt: skip


def made_up(tasks=grid.CHOOSING) -> list[dict]:
    """Rows of a baseline, an arm 5 % better in loss at the same score, and one that is better and loses score."""
    generator, rows = np.random.default_rng(0), []
    for task in tasks:
        for seed in range(1, 7):
            nll = 0.3 * np.exp(0.1 * generator.standard_normal())
            noise = np.exp(0.01 * generator.standard_normal())
            rows += [
                row("decayed:last", task, seed, nll, 0.9),
                row("constant:swa-0.5", task, seed, 0.95 * noise * nll, 0.9),
                row("constant:ema-0.1", task, seed, 0.8 * noise * nll, 0.89),
            ]
    return rows


def test_pairs_come_from_one_machine_and_one_arithmetic_and_others_are_named():
    rows = made_up()
    rows += [row("decayed:last", "trec", 9, 9.0, 0.1, fingerprint="other")]
    rows += [row("constant:swa-0.5", "trec", 1, 9.0, 0.1, machine={"processor": "another", "torch": "t"})]
    kept = arms.keep(rows)
    assert (len(kept.rows), len(kept.others)) == (len(rows) - 2, 2)
    found = kept.comparison("main", "constant:swa-0.5", "decayed:last", "loss")
    assert found is not None
    assert found.by_task["trec"].count == 6
    assert found.overall is not None
    assert found.overall.mean == pytest.approx(-5.0, abs=1)
    assert (
        "left out, from a second machine, at another rate, or other arithmetic: "
        "constant (constant), decayed (other)" in evidence.page(rows, [])
    )


def test_rows_at_another_rate_than_the_chosen_one_are_left_out_and_none_while_it_is_open():
    rows = made_up(tasks=("trec", "cr"))
    wrong = [row("decayed:last", "trec", seed, 9.0, 0.1, rate=2e-4) for seed in range(7, 10)]
    searched = [
        row("decayed:last", "trec", grid.TUNING_SEED, nll, 0.9, split="tuning", rate=rate)
        | {"cell": grid.tuning_cell("decayed", "main", "trec", rate).name}
        for rate, nll in ((2e-4, 0.5), (5e-5, 0.4), (1e-4, 0.3))
    ]
    assert arms.keep([*rows, *wrong, *searched[:2]]).others == []
    kept = arms.keep([*rows, *wrong, *searched])
    assert (kept.others, len(kept.rows)) == (wrong, len(rows))


def test_epochs_are_chosen_on_the_validation_rows_once_every_budget_has_been_tuned():
    r4f = "r4f-relative-1.0-decayed"
    on_validation = {
        ("main", "decayed"): 0.3, ("main", "decayed2x"): 0.2, ("long", "decayed2x"): 0.4,
        ("main", r4f): 0.3, ("long", r4f): 0.1,
    }  # fmt: skip
    on_test = dict.fromkeys(on_validation, 9.0) | {("main", "decayed2x"): 0.5, ("long", r4f): 0.25}
    tuning = [
        row(
            f"{training}:last", "trec", grid.TUNING_SEED, nll + (rate != 1e-4), 0.9, split="tuning", rate=rate
        )
        | {"cell": grid.tuning_cell(training, regime, "trec", rate).name}
        for (regime, training), nll in on_validation.items()
        for rate in grid.RATES
    ]
    tests = [
        row(f"{training}:last", "trec", seed, nll, 0.9, regime=regime)
        for (regime, training), nll in on_test.items()
        for seed in (1, 2, 3)
    ]

    def difference(rows):
        chosen = arms.with_epochs_chosen(arms.keep(rows), rows)
        return chosen.comparison(arms.EPOCHS_CHOSEN, f"{r4f}:last", "decayed2x:last", "loss")

    assert difference([*tuning, *tests]).by_task["trec"].mean == pytest.approx(-50)
    assert "### Epochs chosen" in evidence.page([*tuning, *tests], [])
    unfinished = [each for each in tuning if each["cell"] != grid.tuning_cell(r4f, "long", "trec", 2e-4).name]
    assert difference([*unfinished, *tests]) is None
    there = {"processor": "there", "torch": "t"}
    moved = [each | {"machine": there} if each["regime"] == "long" else each for each in tests]
    assert difference([*tuning, *moved]) is None
    again = [each | {"machine": there} for each in tests if each["training"] == "decayed2x"]
    assert difference([*tuning, *moved, *again]).by_task["trec"].mean == pytest.approx(-50)


def test_each_pair_comes_from_the_machine_that_has_the_most_arms_of_its_seed():
    rows = [entry for entry in made_up(tasks=("trec", "cr")) if entry["task"] == "trec" or entry["seed"] != 2]
    second = {"processor": "another", "torch": "t"}
    rows += [{**entry, "task": "sst2", "machine": second} for entry in rows if entry["task"] == "trec"]
    first = [entry for entry in rows if entry["task"] == "cr" and entry["seed"] == 1]
    rows += [{**entry, "seed": 2, "machine": second} for entry in first]
    kept = arms.keep(rows)
    assert not kept.others
    assert {kind: set(tasks) for kind, tasks in kept.machines().items()} == {
        "p, t": {"trec", "cr"},
        "another, t": {"cr", "sst2"},
    }
    lonely = [{**entry, "seed": 7} for entry in first]
    lonely = [entry if entry["arm"] == "decayed:last" else {**entry, "machine": second} for entry in lonely]
    before, after = (
        arms.keep(kept).comparison("main", "constant:swa-0.5", "decayed:last", "loss")
        for kept in (rows, rows + lonely)
    )
    assert before == after  # arm and baseline of that seed lie on two machines


def test_arms_made_on_two_machines_are_each_held_against_the_baseline_of_their_own():
    here, there = ({"processor": name, "torch": "t"} for name in ("here", "there"))
    rows = []
    for seed in (1, 2, 3):
        for machine, arm, base in (
            (here, "rdrop-decayed:last", 0.5),
            (there, "r3f-independent-decayed:last", 0.25),
        ):
            rows += [
                row("decayed2x:last", "trec", seed, base + seed / 100, 0.9, machine=machine),
                row(arm, "trec", seed, 0.9 * (base + seed / 100), 0.9, machine=machine),
            ]
    kept = arms.keep(rows)
    assert (len(kept.rows), len(kept.bases), len(kept.others)) == (9, 3, 0)
    for arm in ("rdrop-decayed:last", "r3f-independent-decayed:last"):
        found = kept.comparison("main", arm, "decayed2x:last", "loss")
        assert found is not None
        assert (found.by_task["trec"].mean, found.by_task["trec"].count) == (
            pytest.approx(-10),
            3,
        )


def test_the_default_is_the_lowest_loss_among_those_that_lose_no_score():
    assert best_arm(arms.keep(made_up()), 1) == "constant:swa-0.5"
    fewer = made_up(tasks=grid.CHOOSING[:3])
    assert best_arm(arms.keep(fewer), 1) is None
    assert "**Recommended averaging: open.**" in evidence.page(fewer, [])


def test_more_epochs_are_no_objective_and_none_is_chosen_before_every_main_one_is_measured():
    twice = [name for name in grid.MAIN if grid.TRAININGS[name].passes == 2]
    rows = [
        row(arm, task, seed, nll + seed / 1000, 0.9)
        for task in grid.CHOOSING
        for seed in (1, 2, 3)
        for arm, nll in {
            "decayed2x:last": 0.5, "decayed2x:tail-0.1": 0.3, "constant2x:last": 0.5,
            **{f"{name}:last": 0.4 for name in twice},
            f"{twice[-2]}:last": 0.35,
        }.items()
    ]  # fmt: skip
    assert best_arm(arms.keep(rows), 2) == f"{twice[-2]}:last"
    later = [{**entry, "seed": entry["seed"] + 3} for entry in rows]
    for entry in later:
        entry["outcomes"] = entry["outcomes"] | {"nll": 1 / entry["outcomes"]["nll"]}
    assert (
        best_arm(arms.keep(rows + later), 2) == f"{twice[-2]}:last"
    )  # chosen once, by the first three seeds
    fewer = [entry for entry in rows if entry["training"] != twice[0] or entry["task"] != "cr"]
    assert best_arm(arms.keep(fewer), 2) is None
    assert (
        f"**Recommended objective: open.** Not measured yet on all choosing tasks, three seeds each: `{twice[0]}`."
        in evidence.page(fewer, [])
    )


def test_a_training_that_can_no_longer_win_need_not_be_measured_everywhere():
    twice = [name for name in grid.MAIN if grid.TRAININGS[name].passes == 2]
    rows = [
        row(f"{name}:last", task, seed, 0.5 + seed / 1000, 0.9)
        for task in grid.CHOOSING
        for seed in (1, 2, 3)
        for name in ("decayed2x", *twice[1:])
    ]
    tried = {
        task: [row(f"{twice[0]}:last", task, seed, 0.4, 0.9) for seed in (1, 2, 3)] for task in grid.CHOOSING
    }
    rows += tried["trec"] + tried["cr"]
    assert f"three seeds each: `{twice[0]}`." in evidence.page(rows, [])
    for entry in tried["cr"]:
        entry["outcomes"]["nll"] = 0.6
    page = evidence.page(rows, [])
    assert "**Recommended objective: none.**" in page
    assert f"because no result on the rest could change that: `{twice[0]}`." in page


def test_an_objective_must_gain_more_than_its_readout_does_with_the_plain_loss():
    twice = [name for name in grid.MAIN if grid.TRAININGS[name].passes == 2]
    losses = {"decayed2x:last": 0.5, **{f"{name}:last": 0.6 for name in twice}, "rdrop-constant:ema-0.1": 0.4}

    def best(**plain: float) -> tuple[str | None, str]:
        rows = [
            row(arm, task, seed, nll + seed / 1000, 0.9)
            for task in grid.CHOOSING
            for seed in (1, 2, 3)
            for arm, nll in (losses | plain).items()
        ]
        return best_arm(arms.keep(rows), 2), evidence.page(rows, [])

    arm, page = best()
    assert arm is None
    assert (
        "**Recommended objective: open.** Not measured yet on all choosing tasks, three seeds each: `constant2x`."
        in page
    )
    assert best(**{"constant2x:ema-0.1": 0.45})[0] == "rdrop-constant:ema-0.1"
    arm, page = best(**{"constant2x:ema-0.1": 0.35})
    assert arm is None
    assert "**Recommended objective: none.** Over the choosing tasks `rdrop-constant:ema-0.1` beat" in page


def test_what_is_chosen_is_also_told_as_a_choice_that_never_saw_the_task():
    assert "on three of the tasks changes the loss of the fourth by -" in evidence.page(made_up(), [])


def test_losses_and_scores_themselves_are_shown_with_their_spread_from_the_first_seed_on():
    rows = [row("decayed:last", "trec", seed, nll, 0.9) for seed, nll in ((1, 0.3), (2, 0.5))]
    page = evidence.details([*rows, row("constant:last", "trec", 1, 0.25, 0.91)])
    assert "| `decayed:last` | 0.4000 ± 0.1414 |" in page
    assert "| `constant:last` | 0.2500 |" in page
    assert "| `constant:last` | 91.00 |" in page


def test_nothing_is_recommended_where_the_interval_holds_0():
    rows = [entry for entry in made_up() if entry["arm"] != "constant:ema-0.1"]
    for i, entry in enumerate(rows):
        if entry["arm"] == "constant:swa-0.5" and i % 4 == 1:
            entry["outcomes"]["nll"] *= 1.2
    assert best_arm(arms.keep(rows), 1) is None
    assert "**Recommended averaging: none.**" in evidence.page(rows, [])


def test_the_page_is_the_same_for_the_same_rows_in_any_order(tmp_path):
    rows = made_up() + made_up(tasks=grid.CONFIRMING)
    results = tmp_path / "results"
    results.mkdir()
    pages = []
    for turn in (rows, rows[::-1]):
        (results / "rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in turn))
        pages.append([path.read_text() for path in evidence.write(results, tmp_path)])
    assert pages[0] == pages[1]
    assert len(pages[0]) == 3  # the tables and a figure too
    assert "on the confirming tasks: -4." in pages[0][0]


def test_probes_and_flatness_are_on_the_page_once_they_have_three_seeds():
    probed = {"split": "probe", "readout": "last:cola", "probe": "cola"}
    flat = {"split": "flatness", "noise_radii": [0.1], "test_nll": [0.5, 0.75]}
    rows = [
        each
        for seed in (1, 2, 3)
        for each in (
            row("decayed:last", "sst2", seed, 0.5, 0.9) | probed,
            row("decayed:last", "trec", seed, 0.5, 0.9) | flat | {"top_eigenvalue": 12.0, "trace": 345.0},
        )
    ]
    before, page = evidence.page(rows[:4], []), evidence.page(rows, [])
    assert "| `decayed:last` | 90.00 |" not in before
    assert "linear probes on other tasks after" in before
    assert "| `decayed:last` | 90.00 |" in page
    assert "| `decayed:last` | 25.00 | 12.00 | 345.00 |" in page
    assert "linear probes on other tasks after" not in page
    assert "chains and cycles of tasks" in page


def test_beyond_scores_arms_differ_by_pairs_and_the_line_is_shown():
    flat = {"split": "flatness", "noise_radii": [0.1], "top_eigenvalue": 12.0, "trace": 345.0}
    rows = []
    for seed in range(1, 6):
        for arm, rise in (("decayed:last", 0.25), ("constant:last", 0.2)):
            nll = (
                seed / 10
            )  # a seed alone that the arm lacks, and the baseline's own level, change no difference
            if (arm, seed) != ("constant:last", 5):
                rows.append(
                    row(arm, "trec", seed, 0.5, 0.9) | flat | {"test_nll": [nll, nll + rise + seed / 1000]}
                )
        losses = [[nll + 0.5, nll], [nll, nll + 0.5], [nll + 0.5, nll + 1]]
        rows.append(
            row("constant:line", "trec", seed, 0.5, 0.9)
            | {"split": "flatness", "places": [-0.5, 0.0, 1.0], "train_and_test_nll": losses}
        )
    page = evidence.page(rows, [])
    assert "| `decayed:last` | 25.30 | 12.00 | 345.00 |" in page
    assert "| `constant:last` | **-5.00 [-5.00, -5.00]** |" in page
    assert "| loss | -0.5 | 1 |" in page
    for split, away, average in (("training", 50, 50), ("test", -50, 50)):
        told = " | ".join(f"**{end:+.2f} [{end:+.2f}, {end:+.2f}]**" for end in (away, average))
        assert f"| `constant`, {split} rows | {told} |" in page


def test_the_committed_page_is_that_of_the_committed_rows(tmp_path):
    written = evidence.write(ROOT / "benchmarks" / "results" / "study", tmp_path)
    for path in written:
        committed = ROOT / "docs" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed} is old: run `make evidence`"


def test_pages_quote_what_the_committed_rows_say():
    rows = read_rows(ROOT / "benchmarks" / "results" / "study")
    kept = arms.with_epochs_chosen(arms.keep(rows), rows)
    for path in evidence.QUOTING:
        text = path.read_text()
        assert QUOTE.search(text), path
        assert quote(text, kept) == text, f"{path} is old: run `make evidence`"
    assert quote("`constant:swa-0.5`: 1 [2, 3] % of test loss, 4 [5, 6] points of score.", kept).endswith(
        f"`constant:swa-0.5`: {differences(kept, 'constant:swa-0.5', grid.CHOOSING)}."
    )
    with pytest.raises(ValueError, match="measured on too few of sst2, trec, cr, banking77"):
        quote("`smart-decayed:last`: 1 [2, 3] % of test loss, 4 [5, 6] points of score.", kept)


def test_teachers_train_at_the_rates_that_the_committed_rows_choose():
    rows = read_rows(ROOT / "benchmarks" / "results" / "study")
    for teacher, rates in TEACHER_RATES.items():
        assert rates == {task: grid.chosen_rate(teacher, "main", task, rows) for task in grid.CHOOSING}


def test_the_default_rule_is_the_one_that_the_committed_rows_recommend():
    arm = best_arm(arms.keep(read_rows(ROOT / "benchmarks" / "results" / "study")), 1)
    training, _, readout = arm.partition(":")
    assert TRAININGS[training].schedule == "constant"  # what recipes take by themselves when they average
    assert replace(rules_for(TRAININGS[training], 100)[readout], every=1) == RECOMMENDED


def test_of_one_task_the_table_shows_that_task_by_name():
    page = evidence.page([entry for entry in made_up() if entry["task"] == "cr"], [])
    table = page[page.index("#### Choosing tasks") : page.index("## Cost")]
    assert table.count("(cr)") >= 4
    assert "[" not in table
