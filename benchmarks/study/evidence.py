"""Draws docs/evidence.md and its figures from the committed rows: nothing on the page is written by hand twice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.study import beyond, figures
from benchmarks.study.arms import BASELINES, Kept, cost_of, keep
from benchmarks.study.cell import parse_cell
from benchmarks.study.default import choose_default, quote
from benchmarks.study.fitting import REGIMES
from benchmarks.study.grid import (
    CHOOSING,
    CONFIRMING,
    GENERAL,
    PHASES,
    RATES,
    chosen_rate,
    tried,
)
from benchmarks.study.model import ROUNDINGS
from benchmarks.study.numerics import kind_of
from benchmarks.study.statistics import false_alarms
from benchmarks.study.store import Row, read_rows
from benchmarks.study.tables import absolute, by_task, line, table, told_overall
from benchmarks.study.tasks import TASKS, TEST_ROWS, VALIDATION_ROWS
from benchmarks.study.trainings import TRAININGS

HEADLINES = (
    "decayed:tail-0.1", "decayed:tail-0.2", "decayed:chosen", "constant:last", "constant:swa-0.5",
    "constant:swa-0.75", "constant:ema-0.1", "constant:chosen", "rdrop-decayed:last", "rdrop-constant:swa-0.5",
    "r3f-independent-decayed:last", "r3f-independent-constant:swa-0.5", "r3f-relative-1.0-decayed:last",
    "r3f-relative-1.0-constant:swa-0.5",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
QUOTING = (ROOT / "README.md", ROOT / "docs" / "methods.md")
"""Pages written by hand that quote arms, in the form of `quote`."""
NOT_BUILT = ("any model but all-MiniLM-L6-v2, and any machine with a GPU",)


def write(results: Path, folder: Path) -> list[Path]:
    """Write the page and its figures.

    Args:
        results: folder of the rows.
        folder: where evidence.md goes, with its figures in evidence/ beside it.

    Returns:
        The files.
    """
    rows = sorted(read_rows(results), key=lambda row: (row["cell"], row["readout"], row["fingerprint"]))
    drawn = figures.draw(keep(rows), HEADLINES)
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    written = [folder / "evidence.md"]
    written[0].write_text(page(rows, list(drawn)))
    for name, svg in drawn.items():
        written.append(folder / "evidence" / f"{name}.svg")
        written[-1].write_text(svg)
    return written


def requote(results: Path) -> list[Path]:
    """Bring what other pages quote up to date; returns those that changed."""
    kept, changed = keep(read_rows(results)), []
    for path in QUOTING:
        text = path.read_text()
        if (now := quote(text, kept)) != text:
            path.write_text(now)
            changed.append(path)
    return changed


def page(rows: Sequence[Row], drawn: Sequence[str]) -> str:
    """The page, as Markdown.

    Args:
        rows: all that were made.
        drawn: names of the figures that there are.
    """
    kept = keep(rows)
    parts = [
        "# Evidence\n\nWhat averaging and noise buy when a small pretrained encoder is fine-tuned, wins and losses "
        "alike. This page is drawn by `make evidence` from the rows in "
        "[benchmarks/results/study](../benchmarks/results/study); do not edit it.",
        _answer(kept, drawn),
        _every_arm(kept),
        _rounding(kept),
        _absolute(kept),
        _cost(kept),
        _false_alarms(kept),
        beyond.collapse(rows),
        beyond.flatness(rows),
        _tuning(rows),
        _method(kept),
        _not_run(rows, kept),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answer(kept: Kept, drawn: Sequence[str]) -> str:
    lines = ["## The answer so far", *choose_default(kept)]
    shown = table(kept, "main", [arm for arm in HEADLINES if arm in kept.arms("main")])
    if shown is None:
        return "\n\n".join([*lines, "No pair of arms has been measured on three seeds yet."])
    lines.append(
        "Paired differences to the decayed baseline of equal cost (its last weights; trained twice as long where "
        "an arm takes two passes), mean over tasks and 95 % interval. Below 0 is better for the losses, above 0 "
        "for the score. After temperature scaling, by one number from the validation rows, no difference in loss "
        "is one of confidence alone. Bold: the interval leaves out 0."
    )
    lines.append(shown)
    lines += [f"![paired differences of the main arms](evidence/{name}.svg)" for name in drawn]
    return "\n\n".join(lines)


def _every_arm(kept: Kept) -> str:
    parts = ["## Every arm"]
    for regime, settings in REGIMES.items():
        shown = table(kept, regime, kept.arms(regime), p_values=True)
        if shown:
            parts += [f"### {settings.rows:,} training rows", shown, *by_task(kept, regime)]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _absolute(kept: Kept) -> str:
    parts = []
    for regime, settings in REGIMES.items():
        found = absolute(kept, regime)
        if found:
            parts += [f"### {settings.rows:,} training rows", *found]
    if not parts:
        return ""
    return "\n\n".join(["## Losses and scores themselves", "Mean ± standard deviation over seeds.", *parts])


def _rounding(kept: Kept) -> str:
    """What rounding the weights costs, and whether averages bear it better."""
    lines = [
        line(["arm", "rounded to", "loss it costs, %", "against the baseline, rounded alike, %"]),
        line(["---"] * 4),
    ]
    for arm in kept.arms("main"):
        for rounding in ROUNDINGS:
            own = _cost_of_rounding(kept, arm, rounding)
            base = BASELINES.get(cost_of(arm))
            against = (
                kept.comparison("main", arm, base, "loss", rounding=rounding)
                if base and base != arm
                else None
            )
            if own is not None:
                lines.append(line([f"`{arm}`", rounding, f"{own:+.2f}", told_overall(against)]))
    if len(lines) == 2:
        return ""
    return "## After rounding the weights\n\n" + "\n".join(lines)


def _cost_of_rounding(kept: Kept, arm: str, rounding: str) -> float | None:
    whole, rounded = (kept.values("main", arm, "loss", name) for name in (None, rounding))
    return statistics.mean(rounded[key] - whole[key] for key in rounded) if rounded else None


def _cost(kept: Kept) -> str:
    lines = [
        line(["training", "units", "CPU-seconds, as a multiple of `decayed`", "peak memory, GB"]),
        line(["---"] * 4),
    ]
    measured: dict[str, dict[tuple, tuple[float, float]]] = {}
    for row in kept.rows + kept.bases:
        if row["regime"] == "main":
            key = (row["task"], row["seed"], kind_of(row))
            cost = row["cost"]
            measured.setdefault(row["training"], {})[key] = (
                cost["cpu_seconds"],
                cost.get("peak_bytes", math.nan) / 1e9,
            )
    for training, cells in sorted(measured.items(), key=lambda item: list(TRAININGS).index(item[0])):
        shared = [key for key in cells if key in measured.get("decayed", {})]
        if shared:
            ratio = statistics.median(cells[key][0] / measured["decayed"][key][0] for key in shared)
            peaks = [cells[key][1] for key in shared if not math.isnan(cells[key][1])]
            peak = f"{statistics.median(peaks):.1f}" if peaks else "not measured"
            lines.append(line([f"`{training}`", str(TRAININGS[training].units), f"{ratio:.2f}", peak]))
    if len(lines) == 2:
        return ""
    return (
        "## Cost\n\nA unit is a forward and a backward pass over every training row, as often as the baseline "
        "takes. "
        "Seconds are of training with all the averages that its readouts need; in a run that keeps one, averaging "
        "takes a fraction of that.\n\n" + "\n".join(lines)
    )


def _false_alarms(kept: Kept) -> str:
    shares = {}
    for outcome in ("loss", "score"):
        values = kept.values("main", BASELINES[1], outcome)
        of_seeds = {
            task: np.array([values[key] for key in sorted(values) if key[0] == task]) for task in TASKS
        }
        found = false_alarms(of_seeds)
        if found is not None:
            shares[outcome] = found
    if not shares:
        return ""
    told = ", ".join(f"{100 * share:.0f} % for the {outcome}" for outcome, share in shares.items())
    return (
        "## The baseline against itself\n\nSeeds of the decayed baseline are split at random into two halves and "
        f"compared as arms are. The interval over tasks leaves out 0 in {told} of the splits; 5 % is what it "
        "should be. Halves have half the pairs of the tables above."
    )


def _tuning(rows: Sequence[Row]) -> str:
    """Every rate tried, a task a table, the chosen one in bold."""
    parts = []
    for regime in REGIMES:
        for task in TASKS:
            lines = [line(["training", *(f"{rate:g}" for rate in RATES)]), line(["---"] * (len(RATES) + 1))]
            for training in TRAININGS:
                losses = tried(training, regime, task, rows)
                chosen = chosen_rate(training, regime, task, rows)
                told = {rate: f"{loss:.4f}" for rate, loss in losses.items()}
                if chosen is not None:
                    told[chosen] = f"**{told[chosen]}**"
                if told:
                    lines.append(line([f"`{training}`", *(told.get(rate, "") for rate in RATES)]))
            if len(lines) > 2:
                parts += [f"### {task}, {REGIMES[regime].rows:,} training rows", "\n".join(lines)]
    if not parts:
        return ""
    told = "Loss on the validation rows, by learning rate. Bold: the rate that is taken."
    return "\n\n".join(["## Rates tried", told, *parts])


def _method(kept: Kept) -> str:
    longer = ", ".join(f"{name} {task.length}" for name, task in TASKS.items() if task.length > 1)
    budgets = "; ".join(
        f"{settings.rows:,} training rows at most, {settings.epochs} epochs in batches of {settings.batch} "
        f"({longer} times the epochs)"
        for settings in REGIMES.values()
    )
    machines = "; ".join(f"{kind} ({', '.join(tasks)})" for kind, tasks in kept.machines().items())
    return (
        "## How it was measured\n\n"
        f"Machines: {machines or 'none yet'}. "
        "Model: all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters), all weights trained, with the pooler and a "
        "new head. AdamW, weight decay 0.01, gradients clipped at 1, warm-up over 6 % of the steps, weights in "
        f"fp32, passes in the precision named beside the machine. Regimes: {budgets}. A seed draws the training "
        "rows, their order, the head and the dropout masks, the same for every arm. "
        f"Test: {TEST_ROWS} rows of each task at most; {VALIDATION_ROWS} validation rows choose, and are never "
        "reported. "
        f"{', '.join(GENERAL)}: question answering and text generation, which neither choose nor confirm; the "
        "generating ones train on 4 times the rows, a new T5 of 3 and 3 layers (`-new`) or a new decoder of 3 "
        "layers beside the encoder (`-encoder`).\n\n"
        f"Rates are chosen for each training and task, readouts and defaults on {', '.join(CHOOSING)}; "
        f"{', '.join(CONFIRMING)} confirm. The rules were written down before any row of these was made: "
        "[grid.py](../benchmarks/study/grid.py). Every row names the command that makes it again. Intervals are "
        "95 % bootstrap intervals; over tasks, tasks are resampled as well as seeds, which with few tasks is "
        "narrower than it should be. p-values are of two-sided sign tests over all pairs, adjusted for the number "
        "of arms in their table (Holm)."
    )


def _not_run(rows: Sequence[Row], kept: Kept) -> str:
    made = {parse_cell(row["cell"]) for row in rows if "failed" not in row and row["split"] == "test"}
    done = {(cell.regime, cell.training, cell.task, cell.seed) for cell in made}
    untouched = [
        f"* {told}"
        for split, told in beyond.SPLITS.items()
        if not any(row["split"] == split and "failed" not in row for row in rows)
    ]
    lines = [
        "## What was not tested\n",
        *(f"* {missing}" for missing in NOT_BUILT),
        *untouched,
        "\nCells of the grid, made of wanted:\n",
        line(["training", *(f"{settings.rows:,} rows" for settings in REGIMES.values())]),
        line(["---"] * (1 + len(REGIMES))),
    ]
    for training in TRAININGS:
        cells = []
        for regime in REGIMES:
            wanted = {
                (regime, training, task, seed)
                for phase in PHASES
                if (phase.split, phase.regime) == ("test", regime) and training in phase.trainings
                for task in phase.tasks
                for seed in phase.seeds
            }
            cells.append(f"{len(wanted & done)} of {len(wanted)}" if wanted else "not planned")
        lines.append(line([f"`{training}`", *cells]))
    notes = [f"* failed: `{row['cell']}`: {row['failed']}" for row in rows if "failed" in row]
    if kept.others:
        arms = sorted({f"{row['training']} ({row['fingerprint']})" for row in kept.others})
        notes.append(f"* left out, of a second machine or another arithmetic: {', '.join(arms)}")
    return "\n".join([*lines, "", *notes]).rstrip()
