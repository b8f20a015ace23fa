"""The figures of the page, as SVG; the same rows give the same text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from benchmarks.study.arms import OUTCOMES, Kept
from benchmarks.study.default import ALL, covers


def draw(kept: Kept, arms: Sequence[str]) -> dict[str, str]:
    """Every figure for which there are enough rows, by name.

    Args:
        kept: the rows.
        arms: the arms to show, from top to bottom.
    """
    shown = []
    for arm in arms:
        comparisons = [kept.from_baseline("main", arm, outcome, tasks=ALL) for outcome in ("loss", "score")]
        if all(covers(comparison, ALL) for comparison in comparisons):
            shown.append((arm, comparisons))
    return {"main": _forest(shown)} if shown else {}


def _forest(shown: Sequence[tuple]) -> str:
    """Mean differences over tasks with their intervals, and each task's own difference as a small mark."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(9, 0.32 * len(shown) + 1.2))
        for panel, outcome, place in zip(panels, ("loss", "score"), range(2), strict=True):
            panel.axvline(0, color="0.6", linewidth=0.8)
            for y, (_, comparisons) in enumerate(shown):
                found = comparisons[place].overall
                colour = "tab:blue" if found.clear else "0.35"
                panel.plot([found.low, found.high], [y, y], color=colour)
                panel.plot([found.mean], [y], "o", color=colour, markersize=4)
                means = [interval.mean for interval in comparisons[place].by_task.values()]
                panel.plot(means, [y] * len(means), "|", color="0.6", markersize=7)
            panel.set_xlabel(f"difference in {OUTCOMES[outcome]}")
        panels[0].set_yticks(range(len(shown)), [arm for arm, _ in shown])
        panels[0].invert_yaxis()
        figure.tight_layout()
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return re.sub(r"[ \t]+$", "", content.getvalue(), flags=re.M)
