"""Fractions mean the decimal numbers as written: 0.29 of 100 is 29, although the float product is 28.999..."""

from __future__ import annotations

from fractions import Fraction
from numbers import Rational


def share_of(whole: int, fraction: float | Rational) -> Fraction:
    """The exact share ``fraction`` of ``whole``; the caller rounds it.

    Args:
        whole: what it is a share of.
        fraction: a finite number; a float stands for the shortest decimal number that parses to it.
    """
    return whole * Fraction(fraction if isinstance(fraction, Rational) else str(fraction))
