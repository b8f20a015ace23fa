"""Options are declared once, and checked by their declaration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
import pytest

from swaft.errors import ConfigError
from swaft.options import Count, Option, Range, StepOrShare, check, docs_of, options_of, require

pytestmark = pytest.mark.unit

Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Rule:
    weights: Sequence[float] | Decay
    """One number a member,
    or a decay."""
    decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Share that is kept."""
    start: StepOrShare = 0.5
    """First member."""
    every: Count = 1
    include: bool = True
    """Whether the first counts."""


@dataclass(frozen=True)
class Longer(Rule):
    every: Count = 5
    """Steps between two."""
    label: str = ""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": [1.0, 2.0]},
        {"decay": 0.5},
        {"decay": np.float32(0.25)},
        {"decay": Fraction(1, 3)},
        {"start": 0},
        {"start": 100},
        {"start": 1.0},
        {"start": np.int64(7)},
        {"every": np.int32(1)},
        {"include": False},
    ],
)
def test_values_that_the_type_allows_are_taken(options):
    require(Rule(**{"weights": "linear", **options}))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "weights",
            "linaer",
            "is 'linaer', expected Sequence or one of linear, cosine. Did you mean 'linear'?",
        ),
        ("weights", 3, "is 3, expected Sequence or one of linear, cosine"),
        ("decay", 0.0, "is 0.0, expected a number, above 0 and below 1"),
        ("decay", 1, "is 1, expected a number, above 0 and below 1"),
        ("decay", math.nan, "is nan, expected a number, above 0 and below 1"),
        ("decay", "slow", "is 'slow', expected a number, above 0 and below 1"),
        ("start", 1.5, "is 1.5, expected a fraction, at least 0 and at most 1 or a whole number, at least 0"),
        ("start", -1, "is -1, expected a fraction, at least 0 and at most 1 or a whole number, at least 0"),
        (
            "start",
            None,
            "is None, expected a fraction, at least 0 and at most 1 or a whole number, at least 0",
        ),
        ("every", 0, "is 0, expected a whole number, at least 1"),
        ("every", 2.0, "is 2.0, expected a whole number, at least 1"),
        ("every", True, "is True, expected a whole number, at least 1"),
        ("every", math.inf, "is inf, expected a whole number, at least 1"),
        ("include", 1, "is 1, expected true or false"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name, value, said):
    rule = Rule(**{"weights": "linear", name: value})
    assert check(rule) == [(name, said)]


def test_all_values_that_are_not_allowed_are_refused_at_once():
    with pytest.raises(ConfigError) as caught:
        require(Rule("linear", decay=2.0, every=0))
    assert caught.value.problems == [
        "decay is 2.0, expected a number, above 0 and below 1",
        "every is 0, expected a whole number, at least 1",
    ]


def test_an_infinity_is_in_no_range():
    for value in (math.inf, -math.inf, math.nan):
        assert value not in Range()


def test_a_field_says_what_it_may_be_and_what_it_is_for():
    options = options_of(Rule)
    assert list(options) == ["weights", "decay", "start", "every", "include"]
    assert options["weights"].default is MISSING
    assert options["weights"].choices == ("linear", "cosine")
    assert options["decay"] == Option(kinds={float: Range(above=0, below=1)}, optional=True, default=None)
    assert docs_of(Rule) == {
        "weights": "One number a member, or a decay.",
        "decay": "Share that is kept.",
        "start": "First member.",
        "include": "Whether the first counts.",
    }


def test_a_class_has_the_options_and_docs_of_the_one_it_extends():
    assert options_of(Longer)["every"].default == 5
    assert docs_of(Longer) == {**docs_of(Rule), "every": "Steps between two."}
