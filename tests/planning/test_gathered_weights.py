"""Which weights ZeRO-3 holds whole, held to what its coordinator does with four layers of 100 elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plain_runs import MATRIX, plain_run, steps_through

from swaft.planning.gathered import GatheredWeights, Gathering

LAYERS = ((0,), (1,), (2,), (3,))
FAR = 10**9


def held_through(gathering: Gathering, *, learnt: bool, world_size: int = 2) -> list[int]:
    """Bytes held after each moment."""
    moments = steps_through(*LAYERS)
    weights = GatheredWeights(
        plain_run(*[MATRIX] * 4, world_size=world_size), moments, gathering, learnt=learnt
    )
    held = []
    for position, moment in enumerate(moments):
        if moment.kind == "enter":
            weights.enter(position)
        elif moment.kind == "leave":
            weights.leave(position)
        held.append(weights.held)
    return held


def settings(**changed) -> Gathering:
    return replace(Gathering(prefetch_numel=0, max_live_numel=FAR, max_reuse_numel=FAR), **changed)


def test_while_the_order_is_learnt_one_layer_is_held_at_a_time():
    assert max(held_through(settings(), learnt=False)) == 400


def test_a_model_within_the_reuse_distance_is_whole_after_its_forward():
    held = held_through(settings(), learnt=True)
    assert held[2 * len(LAYERS)] == 1600  # at the turn
    assert held[-1] == 0


def test_beyond_the_reuse_distance_a_layer_is_let_go_after_its_forward():
    held = held_through(settings(max_reuse_numel=1), learnt=True)
    # the last layer's backward comes next, so it stays; the others go
    assert held[2 * len(LAYERS)] == 400
    assert max(held) == 400


def test_fetching_ahead_holds_the_next_layer_too():
    held = held_through(settings(max_reuse_numel=1, prefetch_numel=100), learnt=True)
    assert max(held[: 2 * len(LAYERS) - 2]) == 800


def test_small_weights_are_not_counted_here():
    assert max(held_through(settings(persistent=frozenset(range(4))), learnt=True)) == 0


@pytest.mark.parametrize(("world_size", "most"), [(1, 400), (3, 408)])
def test_a_gather_takes_what_is_padded_to_the_ranks(world_size, most):
    weights = GatheredWeights(
        plain_run(MATRIX, world_size=world_size), steps_through((0,)), settings(), learnt=False
    )
    assert weights.enter(0)[0] == most or weights.held == 400
