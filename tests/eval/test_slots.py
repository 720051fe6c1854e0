"""Slots by counting pairs one by one, and windows found at equal slots."""

import numpy as np
import pytest

from dynamic_llava.eval.metrics.slots import chance_of, seen_pairs, slots, window_of


def counted(kept, window):
    """Pairs (token, earlier token) of which the second is seen, by their definition."""
    pairs = [(later, earlier) for later in range(len(kept)) for earlier in range(later)]
    return sum(kept[earlier] or later - earlier <= window for later, earlier in pairs), len(pairs)


@pytest.mark.parametrize("window", [0, 1, 3, 50])
def test_pairs_are_those_of_the_definition(window):
    rng = np.random.default_rng(window)
    for length in (0, 1, 2, 7, 20):
        kept = (rng.random(length) < 0.4).tolist()
        assert seen_pairs(kept, window) == counted(kept, window)


def test_the_share_is_of_all_pairs_together():
    answers = [[True] * 5, [False] * 3]
    assert slots(answers) == 10 / 13
    assert slots(answers, window=1) == 12 / 13  # all of the first, and 2 of 3 of the second
    assert slots([]) == slots([[False]]) == 1.0
    assert slots([[False] * 4], window=3) == 1.0 and slots([[False] * 9]) == 0.0


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.9])
def test_the_window_is_the_smallest_that_gives_at_least_the_share(share):
    lengths, sinks = [30, 41, 55], 4
    rows = [[place < sinks for place in range(length)] for length in lengths]
    window = window_of(lengths, share, sinks)
    assert slots(rows, window) >= share and (window == 0 or slots(rows, window - 1) < share)


def test_a_share_that_sinks_give_already_needs_no_window_and_all_of_it_the_longest():
    assert window_of([20, 20], 0.1, sinks=8) == 0
    assert window_of([20, 30], 1.0, sinks=0) == 29


def test_chance_gives_the_share_in_expectation():
    lengths, window, rng = [60] * 300, 6, np.random.default_rng(0)
    chance = chance_of(lengths, 0.5, window)
    drawn = [(rng.random(length) < chance).tolist() for length in lengths]
    assert slots(drawn, window) == pytest.approx(0.5, abs=0.005)
    assert chance_of(lengths, 0.05, window) == 0.0 and chance_of([5], 0.5, window) == 0.0
