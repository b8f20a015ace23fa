"""Figures of a run as SVG that adapts to the page: text and axes take the page's colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from swaft.report.compare import Difference
from swaft.report.runs import Curve

POINTS = 300
"""Maximum points of a curve; a longer curve is drawn as the mean of each stretch, with a band from minimum to
maximum."""
WIDEST = 76
"""Characters of a label inside a figure: more would leave its axes no room. The table beside it has the whole."""
INK = "#010203"
"""Stands for the page's text colour until the figure is in the page."""
STYLES = {"last": ("#2383c9", "-", "o"), "averaged": ("#d9660c", "--", "s"), "": ("#2383c9", "-", "")}
"""Colour, line and marker of the kinds of weights: distinct without colour, and visible on light and dark."""
ON_COLOURS: Any = {
    "color": "white",
    "bbox": {"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 1.5},
}
"""Style of text that is readable on any colour."""
FONT: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs and settings are text
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "swaft",
}


def curves(title: str, lines: Mapping[str, Curve], *, log: bool = False) -> str:
    """Draw curves over optimizer steps.

    Args:
        title: of the figure.
        lines: by kind of weights (``last``, ``averaged``), or "" for the only one.
        log: whether values span decades.
    """
    with matplotlib.rc_context(FONT):
        figure, axes = _axes(title)
        for name, points in lines.items():
            colour, line, marker = STYLES.get(name, STYLES[""])
            steps, means, lows, highs = thinned(points)
            marker = marker if len(steps) <= 40 else ""
            axes.plot(steps, means, line, color=colour, marker=marker, markersize=4, label=name or None)
            if len(steps) < len(points):
                axes.fill_between(steps, lows, highs, color=colour, alpha=0.25, linewidth=0)
        axes.set_xlabel("optimizer step")
        if log and all(value > 0 for points in lines.values() for _, value in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # the default writes TeX, and here texts are plain
            axes.yaxis.set_minor_formatter(LogFormatter())
        if any(lines):
            axes.legend(frameon=False)
        return _svg(figure, title)


def heat_map(title: str, rows: Sequence[Mapping[str, float]], across: str, down: str) -> str:
    """Draw scores over two choices as a heat map, with numbers if there is room.

    Args:
        title: of the figure.
        rows: ``score`` and the two choices each.
        across: name of the choice on the horizontal axis.
        down: name of the choice on the vertical axis, which runs upwards.
    """
    columns, lines = (sorted({row[name] for row in rows}) for name in (across, down))
    table = np.full((len(lines), len(columns)), np.nan)
    for row in rows:
        table[lines.index(row[down]), columns.index(row[across])] = row["score"]
    with matplotlib.rc_context(FONT):
        figure, axes = _axes(title)
        axes.grid(False)
        image = axes.imshow(table, aspect="auto", cmap="viridis", origin="lower")
        figure.colorbar(image, ax=axes, label="score")
        for set_ticks, values, most in ((axes.set_xticks, columns, 6), (axes.set_yticks, lines, 10)):
            every = -(-len(values) // most)
            set_ticks(range(0, len(values), every), [f"{value:g}" for value in values[::every]])
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        if table.size <= 64:
            middle = np.nanmean(table)
            for (i, j), value in np.ndenumerate(table):
                if not np.isnan(value):
                    shade = "black" if value > middle else "white"
                    axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=shade, fontsize=8)
        return _svg(figure, title)


def line_through(title: str, surface: Mapping[str, Any]) -> str:
    """Draw the loss along the line from the last weights (0) through the averaged ones (1) and beyond."""
    with matplotlib.rc_context(FONT):
        figure, axes = _axes(title)
        axes.plot(
            surface["line"]["position"],
            surface["line"]["loss"],
            color=STYLES["last"][0],
            marker="o",
            markersize=3,
        )
        for place, name in ((0, "last"), (1, "averaged")):
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=STYLES[name][1])
            axes.annotate(
                name,
                (place, 0.96),
                xytext=(4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
            )
        axes.set_xlabel("position: 0 last, 1 averaged")
        axes.set_ylabel("loss")
        return _svg(figure, title)


def plane(title: str, surface: Mapping[str, Any]) -> str:
    """Draw the loss as contours over the plane of both weights and a random direction of the same length."""
    grid = surface["plane"]
    with matplotlib.rc_context(FONT):
        figure, axes = _axes(title)
        axes.grid(False)
        drawn = axes.contourf(grid["across"], grid["up"], grid["loss"], levels=16, cmap="viridis")
        figure.colorbar(drawn, ax=axes, label="loss")
        for place, name in ((0, "last"), (1, "averaged")):
            axes.plot(place, 0, STYLES[name][2], color="white", markeredgecolor="black")
            axes.annotate(name, (place, 0), xytext=(5, 7), textcoords="offset points", **ON_COLOURS)
        axes.set_xlabel("towards the average: 0 last, 1 averaged")
        axes.set_ylabel("random direction")
        return _svg(figure, title)


def differences(title: str, found: Sequence[Difference]) -> str:
    """Draw paired differences: a point for each pair, a bar for the mean, a line for the interval."""
    with matplotlib.rc_context(FONT):
        figure, axes = _axes(title, height=0.9 + 0.5 * len(found))
        axes.grid(visible=False, axis="y")
        for place, each in enumerate(reversed(found)):
            if each.interval:
                axes.plot(each.interval, (place, place), "-", color=INK)
            axes.plot(each.mean, place, "|", color=INK, markersize=16)
            axes.plot(each.values, [place] * len(each.values), "o", color=STYLES["last"][0], markersize=5)
            where = axes.get_yaxis_transform()  # the text starts at the left end of the axes
            label = each.what if len(each.what) <= WIDEST else f"{each.what[: WIDEST - 1]}…"
            axes.text(0.01, place + 0.25, label, transform=where, fontsize=8)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks([])
        axes.set_ylim(-0.5, len(found) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("difference of the pairs")
        return _svg(figure, title)


def thinned(points: Curve) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return what to draw of a curve, as lists of equal length: steps, means, minima and maxima.

    For a short curve, these are its points; for a long one, its stretches, each at its last step.
    """
    stretches = np.array_split(np.array(points, dtype=np.float64), min(len(points), POINTS))
    columns = ((part[-1, 0], part[:, 1].mean(), part[:, 1].min(), part[:, 1].max()) for part in stretches)
    steps, means, lows, highs = (list(map(float, column)) for column in zip(*columns, strict=True))
    return steps, means, lows, highs


def _axes(title: str, height: float = 2.7) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8, height), layout="constrained")  # inches: the width of a phone
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """Return the figure for a page: without the XML header, in the page's colour, labelled with its title."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
    # The white backgrounds of the figure and its axes.
    svg = re.sub(r'<g id="patch_[12]">.*?</g>', "", svg, count=2, flags=re.S)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    label = f'role="img" aria-label="{escape(title)}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: label, svg, count=1)
