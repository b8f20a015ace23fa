"""The page: one HTML file without links to anything outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from swaft import __version__
from swaft.report import figures
from swaft.report.compare import arms_of, compare, scores_of
from swaft.report.runs import RunLog, name_among

TRAINING = {
    "loss": "Training loss",
    "task_loss": "Task loss",
    "divergence": "Divergence",
    "noise_to_signal": "Noise to signal",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "drift": "Drift: distance of the average from the last weights (L2)",
}
"""Numbers of the training log that get a figure, in this order."""
LOGARITHMIC = ("divergence", "grad_norm", "drift")
KINDS = ("last", "averaged")

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2125; --line: #d5d9de; --faint: #5a6169 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181b; --ink: #e3e6e9; --line: #3a4047; --faint: #9aa3ac }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; max-width: 36rem; overflow-x: auto } svg { height: auto; width: 100% }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
.note { color: var(--faint) } code { overflow-wrap: anywhere } td { overflow-wrap: break-word }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer; font-weight: bold }
@media (max-width: 34rem) {
  table { font-size: .8rem } th, td { padding-right: .4rem }
  .stacked th { display: none } .stacked td { border: 0; display: block; padding: 0 0 .4rem }
  .stacked td::before { color: var(--faint); content: attr(data-name) ": " }
  .stacked tr { border-bottom: 1px solid var(--line); display: block; padding: .5rem 0 }
}
"""


def render(runs: Sequence[RunLog]) -> str:
    """Return the page about these runs: their comparison, then a section for each run."""
    if len(runs) == 1:
        title, body = runs[0].name, _run(runs[0])
    else:
        title = f"{len(runs)} runs"
        body = _comparison(runs) + "".join(
            f"\n<details><summary>{escape(name_among(run, runs))}</summary>\n{_run(run)}</details>"
            for run in runs
        )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f'<body><h1>{escape(title)}</h1>\n{body}\n<p class="note">swaft {__version__}</p></body></html>\n'
    )


def _run(run: RunLog) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    parts = [notes, _scores(run), _training(run), _evaluations(run), _surface(run), _windows(run)]
    parts += [_samples(run), _facts(run), _settings(run)]
    return "\n".join(filter(None, parts))


def _scores(run: RunLog) -> str:
    cells = []
    for split, kinds in run.final.items():
        for name, last in kinds.get("last", {}).items():
            averaged, mark = kinds.get("averaged", {}).get(name), " *" if name == run.metric else ""
            cells.append((split, name + mark, _number(last), _number(averaged), _gain(last, averaged)))
    head = ("split", "score", "last", "averaged", "difference")
    note = '<p class="note">* the score that counts</p>' if run.metric else ""
    return _section("Scores", _table(head, cells) + note) if cells else ""


def _training(run: RunLog) -> str:
    drawn = [
        figures.curves(title, {"": run.training[name]}, log=name in LOGARITHMIC)
        for name, title in TRAINING.items()
        if len(run.training.get(name, ())) > 1
    ]
    return _figures("Training", drawn)


def _evaluations(run: RunLog) -> str:
    fewest = 2 if run.final else 1  # a single evaluation at the end is in the table of scores
    drawn = [
        figures.curves(f"{split}: {score}", kinds)
        for split, scores in run.evaluations.items()
        for score, kinds in scores.items()
        if max(map(len, kinds.values()), default=0) >= fewest
    ]
    return _figures("Scores at every evaluation", drawn)


def _surface(run: RunLog) -> str:
    if run.surface is None:
        return ""
    drawn = [
        figures.line_through("Loss from the last weights through the average", run.surface),
        figures.plane("Loss around both", run.surface),
    ]
    note = (
        f'<p class="note">On the first {run.surface.get("rows", "")} {run.surface.get("split", "")} rows, in fp32. '
        "The random direction is orthogonal to the difference of the two weights in every tensor, and as long.</p>"
    )
    return _figures("Flatness", drawn) + note


def _windows(run: RunLog) -> str:
    if not run.windows:
        return ""
    means = [row for row in run.windows if row.get("blend", 1) == 1]
    blended = {(row["start"], row["end"]) for row in run.windows if row not in means}
    drawn = [figures.heat_map("Score of every window tried", means, "start", "end")]
    if blended:  # the chosen window, or the only one
        blends = [row for row in run.windows if (row["start"], row["end"]) in blended]
        drawn.append(figures.heat_map("Score of every blend tried", blends, "blend", "start"))
    return _figures("Chosen after training", drawn)


def _samples(run: RunLog) -> str:
    parts = []
    for split, rows in run.samples.items():
        if rows:
            head = tuple(rows[0])
            cells = [tuple(_text(row.get(name)) for name in head) for row in rows]
            parts.append(_section(f"Samples: {split}", _table(head, cells, stacked=True)))
    return "\n".join(parts)


def _facts(run: RunLog) -> str:
    cells = [(name, _text(value)) for name, value in run.facts.items()]
    return _section("Run", _table(("", ""), cells)) if cells else ""


def _settings(run: RunLog) -> str:
    cells = [(name, _text(value), origin) for name, (value, origin) in run.settings.items()]
    return _section("Settings", _table(("setting", "value", "from"), cells)) if cells else ""


def _comparison(all_runs: Sequence[RunLog]) -> str:
    runs = [run for run in all_runs if run.final]
    waiting = [name_among(run, all_runs) for run in all_runs if not run.final]
    note = f'<p class="note">without scores yet: {escape(", ".join(waiting))}</p>' if waiting else ""
    if len(runs) < 2:
        return _section("Comparison", f'{note}<p class="note">nothing to compare</p>')
    arms, scores, parts = arms_of(runs), scores_of(runs), []
    for split, score in scores:
        found = compare(arms, split, score)
        if not found:
            continue
        cells = [
            (each.what, len(each.values), f"{each.mean:+.4g}", _interval(each.interval)) for each in found
        ]
        head = ("difference", "pairs", "mean", "95 % interval")
        figure = figures.differences(f"{split}: {score}", found)
        parts.append(f'<div class="figures"><figure>{figure}</figure>{_table(head, cells)}</div>')
    if parts:
        parts.append('<p class="note">a point: a pair; the bar: their mean; the line: its 95 % interval</p>')
    rows = [
        (
            name_among(run, runs),
            arm,
            split,
            score,
            *(_number(run.score(split, kind, score)) for kind in KINDS),
        )
        for arm, members in arms.items()
        for run in members
        for split, score in scores
        if any(run.score(split, kind, score) is not None for kind in KINDS)
    ]
    parts.append(_table(("run", "arm", "split", "score", *KINDS), rows))
    return _section("Comparison", "\n".join([note, *parts]))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _figures(title: str, drawn: Sequence[str]) -> str:
    body = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    return _section(title, f'<div class="figures">{body}</div>') if drawn else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, stacked: bool = False) -> str:
    """Return a table; a stacked one shows its cells below each other on a phone, each with its column's name."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    names = [f' data-name="{escape(name)}"' if stacked else "" for name in head]

    def line(row: Sequence[Any]) -> str:
        cells = zip(names, row, strict=True)
        return f"<tr>{''.join(f'<td{name}>{escape(str(cell))}</td>' for name, cell in cells)}</tr>\n"

    lines = "".join(map(line, rows))
    kind = "wide stacked" if stacked else "wide"
    return f'<div class="{kind}"><table><tr>{top}</tr>\n{lines}</table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _gain(last: float, averaged: float | None) -> str:
    return "" if averaged is None else f"{averaged - last:+.4g}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "fewer than three pairs" if interval is None else f"{interval[0]:+.4g} to {interval[1]:+.4g}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " | ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(each)}" for name, each in value.items())
    return _number(value) if isinstance(value, float) else "" if value is None else str(value)
