"""Power-function averages, from which an average of any length can be reconstructed after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import numpy as np

from swaft.averaging.rules.base import DEFAULT, Plan, Readout, Update, spaced
from swaft.errors import AveragingError, ConfigError
from swaft.options import Count, StepOrShare

SIGMA_REL_LIMIT = 12**-0.5
"""Relative width of the uniform profile, an upper limit that no power-function profile reaches."""

MAX_PROFILE_ERROR = 0.1
"""Largest relative error at which a reconstructed profile may still stand for the requested one."""


@dataclass(frozen=True, kw_only=True)
class PowerEMAPlan(Plan):
    """A running mean for each tracked profile, and copies of them at regular counts of members.

    Lanes: the running means in the order of ``sigma_rel``; then the snapshots, by count, each in that order.
    """

    sigma_rel: tuple[float, ...]
    """Relative widths of the tracked profiles."""
    snapshots: int
    """How many times, at most, all of them are copied along the run."""

    @cached_property
    def snapshot_counts(self) -> tuple[int, ...]:
        """Numbers of members after which snapshots are taken, evenly spaced.

        None is taken at the end of the run, where the running means themselves serve as the snapshot.
        """
        spaced = (j * self.num_members // (self.snapshots + 1) for j in range(1, self.snapshots + 1))
        return tuple(sorted(set(spaced) - {0}))

    @cached_property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the tracked profiles."""
        return tuple(gamma_of(sigma) for sigma in self.sigma_rel)

    @property
    def lanes(self) -> tuple[bool, ...]:
        """The running means, then plain copies."""
        tracked = len(self.sigma_rel)
        return (True,) * tracked + (False,) * (tracked * len(self.snapshot_counts))

    def updates(self, n: int) -> tuple[Update, ...]:
        """The member moves every running mean; at the snapshot counts, the means are then copied."""
        # 1 - (n / (n + 1)) ** (gamma + 1), without losing digits where the power is close to 1.
        log_share = math.log1p(-1.0 / (n + 1)) if n else -math.inf
        moves = [Update(i, -math.expm1((gamma + 1.0) * log_share)) for i, gamma in enumerate(self.gammas)]
        copies = [Update(lane, 1.0, source=i) for i, lane in enumerate(self.finished(n))]
        return (*moves, *copies)

    def finished(self, n: int) -> tuple[int, ...]:
        """The snapshots that member ``n`` made."""
        if n + 1 not in self.snapshot_counts:
            return ()
        tracked = len(self.sigma_rel)
        first = tracked * (1 + self.snapshot_counts.index(n + 1))
        return tuple(range(first, first + tracked))

    def readout(self, num_members: int, chosen: Readout = DEFAULT) -> dict[int, float]:
        """The average whose profile has the relative width ``sigma_rel``; without it, the first tracked one.

        A tracked profile is its running mean. Any other is a least-squares fit to its profile by the profiles of
        all available running means and snapshots, with coefficients that sum to 1 (section 3.2 of the paper, which
        uses continuous profiles; here, the exact weights of all members).

        Raises:
            AveragingError: the width is out of range, or the fit is off by more than `MAX_PROFILE_ERROR`.
        """
        chosen.refuse_all_but("sigma_rel")
        sigma = self._sigma(chosen)
        coefficients, error = self._fit(num_members, sigma)
        if error > MAX_PROFILE_ERROR:
            raise AveragingError(
                f"the average of sigma_rel={sigma} over {num_members} members can be reconstructed from these "
                f"snapshots only with a relative error of {error:.2f}, expected at most {MAX_PROFILE_ERROR}; "
                f"choose one closer to {' or '.join(map(str, self.sigma_rel))}, wait for more snapshots, or "
                "take more of them (snapshots)"
            )
        return coefficients

    def resolved(self, num_members: int, chosen: Readout) -> tuple[Readout, range]:
        """A profile by its relative width."""
        return replace(chosen, sigma_rel=self._sigma(chosen)), range(num_members)

    def profile_error(self, num_members: int, sigma_rel: float) -> float:
        """Distance of the profile of :meth:`readout` from the requested one: ``|fit - wanted| / |wanted|``, L2.

        Raises:
            AveragingError: the width is out of range.
        """
        return self._fit(num_members, sigma_rel)[1]

    def _sigma(self, chosen: Readout) -> float:
        return self.sigma_rel[0] if chosen.sigma_rel is None else chosen.sigma_rel

    def _fit(self, num_members: int, sigma_rel: float) -> tuple[dict[int, float], float]:
        if sigma_rel in self.sigma_rel:
            return {self.sigma_rel.index(sigma_rel): 1.0}, 0.0
        if not isinstance(sigma_rel, Real) or not 0.0 < sigma_rel < SIGMA_REL_LIMIT:
            raise AveragingError(
                f"sigma_rel is {sigma_rel!r}, expected a number above 0 and below {SIGMA_REL_LIMIT:.4f}"
            )
        wanted = profile(num_members, gamma_of(sigma_rel), num_members)
        # A snapshot at this very count equals the running mean and adds nothing.
        counts = [num_members, *(count for count in self.snapshot_counts if count < num_members)]
        profiles = np.stack([profile(c, gamma, num_members) for c in counts for gamma in self.gammas], axis=1)
        # Setting the first coefficient to 1 minus the others removes the constraint.
        base, others = profiles[:, :1], profiles[:, 1:]
        solution = np.linalg.lstsq(others - base, wanted - base[:, 0], rcond=None)[0]
        coefficients = np.concatenate([[1.0 - solution.sum()], solution])
        error = np.linalg.norm(profiles @ coefficients - wanted) / np.linalg.norm(wanted)
        return dict(enumerate(coefficients.tolist())), float(error)


@dataclass(frozen=True)
class PowerEMA:
    """Averages whose memory grows with the run; one of any length can be made afterwards, without retraining.

    Karras et al. 2024, EDM2 (arXiv 2312.02696), section 3: at member ``t``, counted from 1,
    ``mean <- beta mean + (1 - beta) weights`` with ``beta = (1 - 1/t) ** (gamma + 1)``, so a member counts in
    proportion to ``t ** gamma``. ``sigma_rel`` is the standard deviation of that profile as a share of the run;
    ``gamma`` follows from it.
    """

    sigma_rel: Sequence[float] = (0.05, 0.10)
    """Relative widths of the profiles that are tracked, each above 0 and below 0.2887. Two, as in the paper, are
    enough to reconstruct all others."""
    start: StepOrShare = 0
    """First member; the profiles stretch from the first member to the latest. A float is a fraction of the run, an
    int a step; 0 is the weights before training."""
    every: Count = 1
    """Optimizer steps between two members."""
    snapshots: Count = 16
    """Copies of each tracked average along the run, evenly spaced, at 4 bytes per element each. Averages of other
    widths are put together from them (`swaft.Readout`); a tracked width needs none."""

    def plan(self, total_steps: int) -> PowerEMAPlan:
        """The events of a run, see `Rule.plan`."""
        steps, sigmas = spaced(self, total_steps), self.sigma_rel
        in_range = all(isinstance(sigma, Real) and 0.0 < sigma < SIGMA_REL_LIMIT for sigma in sigmas)
        if not in_range or not sigmas or len(set(sigmas)) < len(sigmas):
            raise ConfigError(
                f"sigma_rel is {sigmas!r}, expected different numbers above 0 and below {SIGMA_REL_LIMIT:.4f}, "
                "such as (0.05, 0.1)"
            )
        return PowerEMAPlan(**steps, sigma_rel=tuple(map(float, sigmas)), snapshots=self.snapshots)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of relative width ``sigma_rel``.

    The positive root of ``(gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2`` (the paper's equation for the
    width of a power function, solved as in its algorithm 2).
    """
    precision = float(sigma_rel) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision]).real.max())


def profile(count: int, gamma: float, length: int) -> np.ndarray:
    """Weight of each member in the running mean after ``count`` members: (length,), float64, 0 from ``count`` on.

    Exact: the factors ``1 - weight`` are ``(i / (i + 1)) ** (gamma + 1)``, so their product telescopes. The weight
    of member ``i`` is the difference of ``(. / count) ** (gamma + 1)`` between ``i`` and ``i + 1``.
    """
    weights = np.zeros(length)
    weights[:count] = np.diff((np.arange(count + 1) / count) ** (gamma + 1.0))
    return weights
