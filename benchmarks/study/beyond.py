"""The parts of the page beyond scores: representational collapse and flatness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.study.numerics import kind_of
from benchmarks.study.store import Row
from benchmarks.study.tables import line
from benchmarks.study.tasks import TASKS
from benchmarks.study.trainings import TRAININGS

SPLITS = {
    "probe": "representational collapse: linear probes on other tasks after training on sst2",
    "cycle": "representational collapse: chains and cycles of tasks",
    "flatness": "flatness: loss under weight noise and on the line through the average, Hessian eigenvalues",
}
"""Measurements of the harness, and what the page lists as missing without them."""


def collapse(rows: Sequence[Row]) -> str:
    """Scores of probes on frozen features, on other tasks and along chains; empty without rows."""
    parts = []
    probed = _grouped(rows, "probe", lambda row: f"{row['training']}:{row['readout'].split(':')[0]}")
    if probed:
        tasks = sorted({row["probe"] for of in probed.values() for row in of})
        lines = [line(["arm, trained on sst2", *tasks]), line(["---"] * (1 + len(tasks)))]
        for arm, of in probed.items():
            scores = [[_score(row) for row in of if row["probe"] == task] for task in tasks]
            lines.append(line([f"`{arm}`", *map(_mean, scores)]))
        parts.append(_titled("on other tasks", lines))
    chained = _grouped(rows, "cycle", lambda row: row["training"])
    if chained:
        stages = sorted({row["stage"] for of in chained.values() for row in of})
        for kind, place in (
            ("first", "on the first task of the chain, after each stage"),
            ("next", "on the next task, before each stage"),
        ):
            lines = [line(["training", *map(str, stages)]), line(["---"] * (1 + len(stages)))]
            for arm, of in chained.items():
                mine = [row for row in of if row["readout"].endswith(kind)]
                scores = [[_score(row) for row in mine if row["stage"] == stage] for stage in stages]
                lines.append(line([f"`{arm}`", *map(_mean, scores)]))
            parts.append(_titled(place, lines))
    return "\n\n".join(["## Representational collapse", *parts]) if parts else ""


def flatness(rows: Sequence[Row]) -> str:
    """Loss under weight noise, and curvature, by arm; empty without rows."""
    found = _grouped(rows, "flatness", lambda row: row["arm"])
    points = {arm: of for arm, of in found.items() if not arm.endswith(":line")}
    if not points:
        return ""
    radii = next(iter(points.values()))[0]["noise_radii"]
    head = ["arm", *(f"noise {radius:g}" for radius in radii), "top eigenvalue", "trace"]
    lines = [line(head), line(["---"] * len(head))]
    for arm, of in points.items():
        rises = [[row["test_nll"][i + 1] - row["test_nll"][0] for row in of] for i in range(len(radii))]
        curves = [[row[name] for row in of] for name in ("top_eigenvalue", "trace")]
        told = [f"{statistics.mean(rise):+.4f}" for rise in rises]
        lines.append(line([f"`{arm}`", *told, *map(_mean, curves)]))
    return (
        "## Flatness\n\nIncrease in test loss (nats) under Gaussian noise on every weight tensor, its size a share "
        "of the tensor's root mean square; curvature of the training loss. Means over tasks and seeds.\n\n"
        + "\n".join(lines)
    )


def _titled(place: str, lines: Sequence[str]) -> str:
    table = "\n".join(lines)
    return f"Score of a linear probe {place}, in points, mean over seeds.\n\n{table}"


def _grouped(rows: Sequence[Row], split: str, name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows of a split by a name, in the order of the trainings, from the kind of machine that has the most."""
    measured = [row for row in rows if row["split"] == split and "failed" not in row]
    machine = max(sorted(map(kind_of, measured)), key=[*map(kind_of, measured)].count, default="")
    found: dict[str, list[Row]] = {}
    order = list(TRAININGS)
    for row in sorted(measured, key=lambda row: order.index(row["training"])):
        if kind_of(row) == machine:
            found.setdefault(name(row), []).append(row)
    return found


def _score(row: Row) -> float:
    return 100 * row["outcomes"][TASKS[row["probe"]].score]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" if values else ""
