"""Budgets: what a rule lets tokens see is counted pair by pair here, and each rule's number is the best that fits."""

import numpy as np
import pytest
import torch

from dynamic_llava.methods import OutputTokens
from dynamic_llava.smol.rules import (
    LastTokens,
    controls,
    learned_rule,
    pairs,
    random_rate,
    threshold_of,
    visible,
    widest_window,
)

LENGTHS = (1, 7, 30, 12)
BUDGETS = (0.75, 0.5, 0.35, 0.2, 0.1)


def seen_by_hand(kept, window):
    """Return how many earlier tokens all tokens see, one pair at a time."""
    return sum(bool(kept[j]) or i - j <= window for i in range(len(kept)) for j in range(i))


def share(kept_of_answers, window):
    seen = sum(seen_by_hand(kept, window) for kept in kept_of_answers)
    return seen / sum(pairs(len(kept)) for kept in kept_of_answers)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_pairs_are_counted(window):
    rng = np.random.default_rng(window)
    for length in LENGTHS:
        kept = rng.random(length) < 0.4
        assert visible(kept, window) == seen_by_hand(kept, window)
    assert visible(np.ones(9, dtype=bool), window) == pairs(9) == 36


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_threshold_keeps_the_highest_margins_that_fit(budget, window):
    rng = np.random.default_rng(7)
    margins = [rng.normal(size=length) for length in LENGTHS]
    threshold = threshold_of(margins, budget, window)
    if window and share([np.zeros(length) for length in LENGTHS], window) > budget:
        assert threshold is None
        return
    held = share([one > threshold for one in margins], window)
    below = np.sort(np.concatenate(margins))
    lower = below[below < threshold][-1] - 1e-9  # one token more
    assert held <= budget < share([one > lower for one in margins], window)


def test_equal_margins_and_whole_budgets():
    same = [np.zeros(5), np.zeros(3)]
    assert share([one > threshold_of(same, 0.5, 0) for one in same], 0) <= 0.5
    rising = [np.arange(6.0)]
    assert (rising[0] > threshold_of(rising, 1.0, 0)).all()
    assert not (rising[0] > threshold_of(rising, 0.0, 0))[:-1].any(), "the last token is seen by nobody"
    assert threshold_of(rising, 0.0, 1) is None


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_widest_window_and_the_random_share(budget):
    sinks = [np.arange(length) < 2 for length in LENGTHS]
    window = widest_window(LENGTHS, budget, 2)
    if window is None:
        assert share(sinks, 0) > budget
    else:
        assert share(sinks, window) <= budget < share(sinks, window + 1)
    rate, bare = random_rate(LENGTHS, budget, 3, 5), share([np.zeros(length) for length in LENGTHS], 3)
    assert (rate is None) is (bare > budget)
    if rate is not None:  # as the method will draw: the answer's place is its key
        drawn = [outputs(length, number) for number, length in enumerate(LENGTHS)]

        def held(rate):
            return share([LastTokens(keep_rate=rate, seed=5).keep_output(one, None).numpy() for one in drawn], 3)

        assert held(rate) <= budget < held(min(1.0, rate + 0.1))


def outputs(count, key=0):
    return OutputTokens(torch.zeros(count, 4), torch.arange(count), torch.full((count,), key))


def test_last_tokens_keeps_sinks_and_a_random_share():
    kept = LastTokens(keep_rate=0.3, sinks=4).keep_output(outputs(20_000), None)
    assert kept[:4].all() and 0.29 < kept[4:].double().mean() < 0.31
    again, other = (LastTokens(keep_rate=0.3, sinks=4).keep_output(outputs(20_000, key), None) for key in (0, 1))
    assert torch.equal(kept, again) and not torch.equal(kept, other)
    assert not LastTokens(window=3).keep_output(outputs(50), None).any() and LastTokens(window=3).drop_delay == 3
    with pytest.raises(ValueError, match="window=-1"):
        LastTokens(window=-1)


def test_rules_that_cannot_hold_a_budget_are_said():
    rules, without = controls(LENGTHS, 0.05, 1, window=8, sinks=9)
    assert [rule.title for rule in rules] == ["random", "H2O", "TOVA", "KNorm"]
    assert without == [
        "random + last w: the last 8 alone are more than 5%",
        "sinks + last w: 9 sinks alone are more than 5%",
    ]
    rules, without = controls(LENGTHS, 0.5, 1, window=2, sinks=2)
    assert len(rules) == 6 and not without and len({rule.key for rule in rules}) == 6
    assert all(rule.method.layer == 1 and rule.budget == 0.5 for rule in rules)
    margins = [np.arange(float(length)) for length in LENGTHS]
    assert learned_rule(margins, 0.05, 1, 8, 0) is None
    rule = learned_rule(margins, 0.5, 1, 2, 3)
    assert (rule.method.output_window, rule.method.sparsity, rule.seed) == (2, "output", 3)
