"""The parts of the page beyond scores: representational collapse and flatness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.study.arms import FEWEST_SEEDS
from benchmarks.study.collapse import PRETRAINED
from benchmarks.study.flatness import ITERATIONS, PROBES
from benchmarks.study.grid import at_chosen_rates
from benchmarks.study.numerics import kind_of
from benchmarks.study.statistics import compare
from benchmarks.study.store import Row
from benchmarks.study.tables import markdown, told
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import BASELINE, BASELINES, TRAININGS

SPLITS = {
    "probe": "representational collapse: linear probes on other tasks after training on sst2",
    "cycle": "representational collapse: chains and cycles of tasks",
    "flatness": "flatness: loss under weight noise and on the line through the average, Hessian eigenvalues",
}
"""Measurements of the harness, and what the page lists as missing without them."""
PAIRED = (
    "The first line of the table has the baseline's means over tasks and seeds, the others the paired differences "
    "from it, with 95 % intervals."
)

Values = Mapping[tuple[str, int], float]
"""By task and seed."""


def comparable(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of a split; none of fewer seeds than an interval needs."""
    found = [row for row in rows if row["split"] == split and "failed" not in row]
    return found if len({row["seed"] for row in found}) >= FEWEST_SEEDS else []


def collapse(rows: Sequence[Row]) -> str:
    """Scores of probes on frozen features, on other tasks and along chains; empty without rows."""
    parts = []
    probed = _grouped(rows, "probe", _probed)
    if probed:
        tasks = sorted({row["probe"] for of in probed.values() for row in of})
        columns = {
            task: lambda row, task=task: _score(row) if row["probe"] == task else None for task in tasks
        }
        parts += [
            f"{_titled('on other tasks')} `{PRETRAINED}` is the encoder before training.",
            _table("arm, trained on sst2", probed, BASELINES[1], columns),
        ]
    chained = _grouped(rows, "cycle", lambda row: row["training"])
    for kind, place in (
        ("first", "on the first task of the chain, after each stage"),
        ("next", "on the next task, before each stage"),
    ):
        stages = sorted(
            {
                (row["stage"], row["probe"])
                for of in chained.values()
                for row in of
                if row["readout"].endswith(kind)
            }
        )
        if chained:
            columns = {
                f"{stage} {probed}": lambda row, at=f"{stage:02}:{kind}": (
                    _score(row) if row["readout"] == at else None
                )
                for stage, probed in stages
            }
            parts += [_titled(place), _table("training", chained, BASELINE, columns)]
    return "\n\n".join(["## Representational collapse", *parts]) if parts else ""


def flatness(rows: Sequence[Row]) -> str:
    """Loss under weight noise and on the line through the average, and curvature, by arm; empty without rows."""
    found = _grouped(rows, "flatness", lambda row: row["arm"])
    points = {arm: of for arm, of in found.items() if not arm.endswith(":line")}
    if not points:
        return ""
    radii = next(iter(points.values()))[0]["noise_radii"]
    columns = {
        f"noise {radius:g}": lambda row, i=i: 100 * (row["test_nll"][i + 1] - row["test_nll"][0])
        for i, radius in enumerate(radii)
    } | {name: lambda row, name=name: row[name.replace(" ", "_")] for name in ("top eigenvalue", "trace")}
    tasks = sorted({row["task"] for of in points.values() for row in of}, key=list(TASKS).index)
    parts = [
        "## Flatness",
        f"On {', '.join(tasks)}. Increase in test loss (0.01 nats) under Gaussian noise on every weight tensor, "
        "given as a share of the "
        "tensor's root mean square; curvature of the training loss (the eigenvalue after "
        f"{ITERATIONS} power iterations, an underestimate if anything; the trace from {PROBES} random vectors). "
        f"{PAIRED}",
        _table("arm", points, BASELINES[1], columns),
    ]
    lines = {arm.partition(":")[0]: of for arm, of in found.items() if arm not in points}
    if lines:
        parts += [
            "Loss (0.01 nats) on the line from the last weights (0) through the average (1), as the difference "
            "from the last weights, with 95 % intervals.",
            _along(lines),
        ]
    return "\n\n".join(parts)


def _along(trainings: Mapping[str, Sequence[Row]]) -> str:
    """Training and test loss along the line, by training."""
    places = next(iter(trainings.values()))[0]["places"]
    away = [i for i, place in enumerate(places) if place]
    lines = []
    for training, of in trainings.items():
        for side, rows in enumerate(("training", "test")):
            losses = [
                _values(of, lambda row, i=i, side=side: 100 * row["train_and_test_nll"][i][side])
                for i in range(len(places))
            ]
            differences = [_difference(losses[i], losses[places.index(0)]) for i in away]
            lines.append([f"`{training}`, {rows} rows", *differences])
    return markdown(["loss", *(f"{places[i]:g}" for i in away)], lines)


def _probed(row: Row) -> str:
    readout = row["readout"].partition(":")[0]
    return PRETRAINED if readout == PRETRAINED else f"{row['training']}:{readout}"


def _titled(place: str) -> str:
    rate = "All arms train at the baseline's rate, though two passes or twice the steps cost twice as much."
    return f"Score of a linear probe {place}, in points. {rate} {PAIRED}"


def _table(
    title: str,
    arms: Mapping[str, Sequence[Row]],
    base: str,
    columns: Mapping[str, Callable[[Row], float | None]],
) -> str:
    """One line per arm and one column per number: the baseline's means, then paired differences from it."""
    lines = []
    theirs = {name: _values(arms.get(base, ()), value) for name, value in columns.items()}
    if base in arms:
        means = [f"{statistics.mean(found.values()):.2f}" if found else "" for found in theirs.values()]
        lines.append([f"`{base}`", *means])
    for arm in arms:
        if arm != base:
            differences = [_difference(_values(arms[arm], columns[name]), theirs[name]) for name in columns]
            if any(differences):
                lines.append([f"`{arm}`", *differences])
    return markdown([title, *columns], lines)


def _values(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Values:
    return {(row["task"], row["seed"]): found for row in rows if (found := value(row)) is not None}


def _difference(ours: Values, theirs: Values) -> str:
    """The mean of the paired differences, with its interval if there are tasks enough."""
    found: dict[str, list[float]] = {}
    for at in sorted(ours.keys() & theirs.keys()):
        found.setdefault(at[0], []).append(ours[at] - theirs[at])
    pairs = {task: np.array(each) for task, each in found.items() if len(each) >= FEWEST_SEEDS}
    if not pairs:
        return ""
    found = compare(pairs)
    if found.overall is not None:
        return told(found.overall)
    names = {task: f" ({task})" if len(pairs) > 1 else "" for task in pairs}
    return ", ".join(f"{told(each)}{names[task]}" for task, each in found.by_task.items())


def _grouped(rows: Sequence[Row], split: str, name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows of a split at the chosen rates by a name, in the order of the trainings, from the kind of machine that
    has the most.
    """
    measured = at_chosen_rates(comparable(rows, split), rows)
    machine = max(sorted(map(kind_of, measured)), key=[*map(kind_of, measured)].count, default="")
    found: dict[str, list[Row]] = {}
    order = list(TRAININGS)
    for row in sorted(measured, key=lambda row: order.index(row["training"])):
        if kind_of(row) == machine:
            found.setdefault(name(row), []).append(row)
    return found


def _score(row: Row) -> float:
    return 100 * row["outcomes"][TASKS[row["probe"]].score]
