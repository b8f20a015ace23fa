"""The search for the best window, on one rank and agreed among several."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_runs import attached, take_step

from swaft.averaging.rules import SWA, Readout, Windows
from swaft.averaging.search import most_evaluations, search_windows
from swaft.errors import AveragingError

pytestmark = pytest.mark.unit


class Averager:
    """Stands in for a `WeightAverager` after ``applied_steps`` of 15 steps; knows which window is swapped in."""

    def __init__(self, *, applied_steps=15, blocks=4, gather=lambda value: [value], rules=None):
        self.rules = rules or {None: Windows(blocks=blocks)}
        self.applied_steps = applied_steps
        self.engine = SimpleNamespace(ranks=SimpleNamespace(gather=gather))
        self.inside = None
        self.swaps = []

    def plan(self, name=None):
        return self.rules[name].plan(15)

    def count(self, name=None):
        return self.plan(name).members_until(self.applied_steps)

    @contextmanager
    def swapped_in(self, readout):
        self.plan(readout.rule).readout(self.applied_steps + 1, readout)
        self.inside = (readout.start, readout.end)
        self.swaps.append((readout.rule, self.inside))
        yield
        self.inside = None


def span(tried):
    return (tried.start, tried.end, tried.members)


def score_of(averager, scores, default=0.0):
    return lambda: scores.get(averager.inside, default)


def test_starts_are_tried_first_and_then_the_ends_of_the_best_start():
    averager = Averager()
    found = search_windows(averager, score_of(averager, {(4, 15): 2.0, (4, 11): 3.0}))
    tried = [(each.start, each.end) for each in found.tried]
    assert tried == [(0, 15), (4, 15), (8, 15), (12, 15), (4, 7), (4, 11)]
    assert averager.swaps == [(None, window) for window in tried]
    assert (span(found.best), found.best.score) == ((4, 11, 8), 3.0)


def test_the_number_of_evaluations_grows_with_the_blocks_and_not_with_their_pairs():
    averager = Averager(blocks=16)
    expected = most_evaluations(averager)
    found = search_windows(averager, score_of(averager, {}))
    assert len(found.tried) == len(averager.swaps) == expected == 31
    assert most_evaluations(averager, blends=(0.0, 0.5)) == 33


def test_a_loss_is_searched_by_min():
    averager = Averager()
    found = search_windows(averager, score_of(averager, {(8, 15): 0.1, (8, 11): 0.2}, 1.0), better=min)
    assert (found.best.start, found.best.end, found.best.score) == (8, 15, 0.1)


def test_windows_of_your_own_are_the_only_ones_tried():
    averager = Averager()
    windows = [(4, 7), (None, None), (0.8, 1.0)]
    found = search_windows(averager, score_of(averager, {(12, 15): 5.0}), windows=windows)
    assert [(w.start, w.end, w.members) for w in found.tried] == [(4, 7, 4), (0, 15, 16), (12, 15, 4)]
    assert span(found.best) == (12, 15, 4)


def test_of_equal_scores_the_longer_window_wins_and_then_the_later():
    averager = Averager()
    assert span(search_windows(averager, score_of(averager, {})).best) == (0, 15, 16)
    windows = [(8, 11), (0, 3), (12, 15), (4, 7)]
    assert span(search_windows(averager, score_of(averager, {}), windows=windows).best) == (12, 15, 4)
    windows = [(12, 15), (0, 7)]
    assert span(search_windows(averager, score_of(averager, {}), windows=windows).best) == (0, 7, 8)


@pytest.mark.parametrize("better", [max, min])
def test_a_score_that_is_no_number_never_wins(better):
    averager = Averager()
    found = search_windows(
        averager, score_of(averager, {(0, 15): math.nan, (4, 15): 1.0}, math.nan), better=better
    )
    assert (found.best.start, found.best.end, found.best.score) == (4, 15, 1.0)
    assert math.isnan(found.tried[0].score)


def test_scores_that_are_all_no_numbers_are_an_error():
    averager = Averager()
    with pytest.raises(AveragingError, match="none of the 4 windows"):
        search_windows(averager, score_of(averager, {}, math.nan))


def test_ranks_that_measure_differently_decide_as_rank_0_does():
    said = []

    def gather_on_rank_0(value):
        said.append(value)
        return [value, -value]

    first = Averager(gather=gather_on_rank_0)
    on_rank_0 = search_windows(first, score_of(first, {(4, 15): 2.0, (4, 11): 3.0}))
    replay = iter(said)
    second = Averager(gather=lambda value: [next(replay), value])
    on_rank_1 = search_windows(second, score_of(second, {(12, 15): 9.0}))
    assert on_rank_1 == on_rank_0
    assert first.swaps == second.swaps


def test_in_mid_run_windows_end_at_the_latest_member():
    averager = Averager(applied_steps=9)
    found = search_windows(averager, score_of(averager, {}))
    assert [(w.start, w.end) for w in found.tried] == [(0, 9), (4, 9), (8, 9), (0, 3), (0, 7)]


def test_one_of_several_rules_is_searched_by_its_name():
    rules = {None: SWA(), "windows": Windows(blocks=2)}
    averager = Averager(rules=rules)
    search_windows(averager, score_of(averager, {}), name="windows")
    assert averager.swaps == [("windows", (0, 15)), ("windows", (8, 15)), ("windows", (0, 7))]
    with pytest.raises(AveragingError, match=r"whose rule keeps none; expected the rule `Windows`"):
        search_windows(averager, score_of(averager, {}))


def test_a_window_off_the_boundaries_is_refused_before_anything_is_evaluated():
    averager = Averager()
    with pytest.raises(AveragingError, match="begins at step 5"):
        search_windows(averager, score_of(averager, {}), windows=[(0, 15), (5, 15)])
    assert averager.swaps == []


def test_a_search_before_the_first_member_is_refused():
    averager = Averager(applied_steps=3, rules={None: Windows(start=5)})
    with pytest.raises(AveragingError, match=r"nothing is averaged yet at step 3.* step 5"):
        search_windows(averager, score_of(averager, {}))


def test_an_evaluation_that_returns_no_number_is_refused_with_what_was_meant():
    with pytest.raises(AveragingError, match=r"returned dict, expected one number"):
        search_windows(Averager(), lambda: {"accuracy": 1.0})


def test_better_is_max_or_min():
    with pytest.raises(AveragingError, match="max or min"):
        search_windows(Averager(), lambda: 0.0, better=sum)


def test_blends_and_scopes_are_chosen_after_the_window_one_by_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 1))
    optimizer, averager = attached(model, rule=Windows(blocks=2), total_steps=3)
    for _ in range(3):
        take_step(model, optimizer, torch.randint(4, (8,)))
        averager.step()
    wanted = Readout(start=2, end=3, blend=0.5, scope="no_embeddings")
    with averager.swapped_in(wanted):
        target = [p.detach().clone() for p in model.parameters()]

    def distance() -> float:
        return sum(float((p.detach() - t).norm()) for p, t in zip(model.parameters(), target, strict=True))

    found = search_windows(averager, distance, better=min, blends=(0, 0.5), scopes=("no_embeddings",))
    assert [(t.readout.blend, t.readout.scope) for t in found.tried[-3:]] == [
        *((0, "all"), (0.5, "all"), (0.5, "no_embeddings"))
    ]
    assert found.best.row() == {
        **{"start": 2, "end": 3, "members": 2, "blend": 0.5},
        **{"scope": "no_embeddings", "score": found.best.score},
    }
    with averager.swapped_in(found.best.readout):
        assert distance() == found.best.score


def test_a_rule_without_windows_is_searched_for_its_blend_alone():
    averager = Averager(rules={None: SWA(start=3)})
    averager.swapped_in = contextmanager(lambda readout: iter([setattr(averager, "inside", readout.blend)]))
    found = search_windows(averager, score_of(averager, {0.6: 3.0, 0.0: 1.0}), blends=(0.0, 0.3, 0.6))
    assert [tried.readout.blend for tried in found.tried] == [1.0, 0.0, 0.3, 0.6]
    assert (span(found.best), found.best.readout) == ((3, 15, 13), Readout(blend=0.6))


@pytest.mark.parametrize("asked", [{"blends": (0.5, 3)}, {"scopes": ("head",)}])
def test_a_blend_or_scope_that_does_not_exist_is_refused_before_anything_is_evaluated(asked):
    averager = Averager()
    with pytest.raises(AveragingError, match="expected"):
        search_windows(averager, score_of(averager, {}), **asked)
    assert averager.swaps == []


def test_with_a_real_averager_the_best_window_has_the_mean_that_was_scored():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer, averager = attached(model, rule=Windows(blocks=4), total_steps=15)
    seen = [model.weight.detach().clone()]
    for _ in range(15):
        take_step(model, optimizer)
        averager.step()
        seen.append(model.weight.detach().clone())
    live, wanted = seen[-1], torch.stack(seen[4:12]).double().mean(0)

    found = search_windows(
        averager, lambda: float((model.weight.detach().double() - wanted).norm()), better=min
    )
    assert span(found.best) == (4, 11, 8)
    assert found.best.score < 1e-7
    assert torch.equal(model.weight, live)
