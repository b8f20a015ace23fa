"""Several runs side by side: paired differences over seeds, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swaft.report.runs import RunLog, name_among

NOT_OF_AN_ARM = ("train.seed", "train.output_dir", "track.run_name", "track.logging_dir")
"""Settings that may differ between repetitions of one arm."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The differences of pairs: one minus the other."""

    what: str
    """What is subtracted from what, and for which score."""
    values: tuple[float, ...]
    """One per pair."""
    interval: tuple[float, float] | None
    """95 % interval, from pairs resampled with replacement; None for fewer than three pairs."""

    @property
    def mean(self) -> float:
        """Mean over all pairs."""
        return float(np.mean(self.values))


def arms_of(runs: Sequence[RunLog]) -> dict[str, list[RunLog]]:
    """Group runs that differ only in the seed, and name each group by the settings that distinguish it.

    Runs without settings (the Trainer's) are separate arms, by name.
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


def scores_of(runs: Sequence[RunLog]) -> list[tuple[str, str]]:
    """Return split and name of every final score that any of these runs has."""
    kinds_of = [(split, kinds) for run in runs for split, kinds in run.final.items()]
    return list(dict.fromkeys((split, name) for split, kinds in kinds_of for name in kinds.get("last", {})))


def compare(arms: Mapping[str, Sequence[RunLog]], split: str, score: str) -> list[Difference]:
    """Return the paired differences of a score: averaged minus last in every arm, and every arm minus the first.

    Arms are paired by seed, using the averaged weights of an arm that has some, else the last.
    """
    found = []
    for arm, runs in arms.items():
        pairs = [(run.score(split, "averaged", score), run.score(split, "last", score)) for run in runs]
        found.append(difference(f"averaged − last ({arm})", pairs))
    first, *others = arms
    kinds = {
        arm: "last" if all(run.score(split, "averaged", score) is None for run in runs) else "averaged"
        for arm, runs in arms.items()
    }
    before = {_seed(run): run.score(split, kinds[first], score) for run in arms[first]}
    for arm in others:
        pairs = [(run.score(split, kinds[arm], score), before.get(_seed(run))) for run in arms[arm]]
        found.append(difference(f"{arm}, {kinds[arm]} − {first}, {kinds[first]}", pairs))
    return [each for each in found if each.values]


def difference(what: str, pairs: Sequence[tuple[float | None, float | None]]) -> Difference:
    """Return the differences of the pairs with two known values, with a bootstrap interval of their mean."""
    values = np.array([a - b for a, b in pairs if a is not None and b is not None], dtype=np.float64)
    interval = None
    if len(values) >= 3:
        rng = np.random.default_rng(0)
        means = rng.choice(values, (RESAMPLES, len(values))).mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        interval = float(low), float(high)
    return Difference(what, tuple(map(float, values)), interval)


def _seed(run: RunLog) -> Any:
    return run.settings.get("train.seed", (run.name, ""))[0]
