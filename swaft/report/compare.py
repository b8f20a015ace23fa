"""Several runs side by side: paired differences over seeds, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swaft.report.runs import RunLog, name_among

NOT_OF_AN_ARM = ("train.seed", "train.output_dir", "track.run_name", "track.logging_dir")
"""Settings in which repetitions of one arm differ."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Of pairs, one minus the other."""

    what: str
    """Which minus which, of which score."""
    values: tuple[float, ...]
    """One a pair."""
    interval: tuple[float, float] | None
    """95 %, over pairs resampled with replacement; None under three pairs."""

    @property
    def mean(self) -> float:
        """Of all pairs."""
        return float(np.mean(self.values))


def arms_of(runs: Sequence[RunLog]) -> dict[str, list[RunLog]]:
    """Group runs that differ in nothing but the seed, each group by the settings that set it apart.

    Runs without settings (the Trainer's) are arms of their own, by name.
    """
    keys = [
        {name: value for name, (value, _) in run.settings.items() if name not in NOT_OF_AN_ARM}
        or {"run": name_among(run, runs)}
        for run in runs
    ]
    names = {name for key in keys for name in key}
    apart = sorted(name for name in names if len({repr(key.get(name)) for key in keys}) > 1)
    arms: dict[str, list[RunLog]] = {}
    for run, key in zip(runs, keys, strict=True):
        label = ", ".join(f"{name}={key[name]}" for name in apart if name in key) or "all runs"
        arms.setdefault(label, []).append(run)
    return arms


def compare(arms: Mapping[str, Sequence[RunLog]], split: str, score: str) -> list[Difference]:
    """Return the paired differences of a score: averaged minus last in every arm, and every arm minus the first.

    Arms are paired by seed, and by what their runs recommend: the averaged weights where there are some.
    """
    found = []
    for arm, runs in arms.items():
        pairs = [(_score(run, split, "averaged", score), _score(run, split, "last", score)) for run in runs]
        found.append(difference(f"averaged − last ({arm})", pairs))
    first, *others = arms
    before = {_seed(run): _kept(run, split, score) for run in arms[first]}
    for arm in others:
        pairs = [(_kept(run, split, score), before.get(_seed(run))) for run in arms[arm]]
        found.append(difference(f"{arm} − {first}", pairs))
    return [each for each in found if each.values]


def difference(what: str, pairs: Sequence[tuple[float | None, float | None]]) -> Difference:
    """Return the differences of those pairs of which both are known, with a bootstrap interval of their mean."""
    values = np.array([a - b for a, b in pairs if a is not None and b is not None], dtype=np.float64)
    interval = None
    if len(values) >= 3:
        rng = np.random.default_rng(0)
        means = rng.choice(values, (RESAMPLES, len(values))).mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        interval = float(low), float(high)
    return Difference(what, tuple(map(float, values)), interval)


def _score(run: RunLog, split: str, weights: str, score: str) -> float | None:
    return run.final.get(split, {}).get(weights, {}).get(score)


def _kept(run: RunLog, split: str, score: str) -> float | None:
    averaged = _score(run, split, "averaged", score)
    return _score(run, split, "last", score) if averaged is None else averaged


def _seed(run: RunLog) -> Any:
    return run.settings.get("train.seed", (run.name, ""))[0]
