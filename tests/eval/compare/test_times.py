"""Times are taken in turn: each method warms up, and what slows the machine for a while slows all of them."""

import pytest

from dynamic_llava.eval.efficiency import Times, interleaved_times


class FakeClock:
    """Says what it was asked for, and answers with times of its own: a prefill of 2 s, steps of 0.5 s."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def seconds(self, count):
        """Return the seconds of a prefill and of count new tokens, the first of which it gives."""
        self.calls.append((self.name, count))
        return 2 + 0.5 * (count - 1)


def test_each_round_has_every_method_and_begins_with_the_next():
    calls = []
    times = interleaved_times([FakeClock(name, calls) for name in "abc"], tokens=4, repeats=3)
    assert calls[:3] == [("a", 2), ("b", 2), ("c", 2)], "a warm-up of each"
    assert "".join(name for name, count in calls[3:] if count == 1) == "abcbcacab"
    assert [count for _, count in calls[3:]] == [1, 5] * 9
    assert times == [Times((2000.0,) * 3, (500.0,) * 3)] * 3


def test_medians_and_quartiles():
    found = Times((1.0, 2.0, 3.0, 10.0, 4.0), (0.5, 0.5)).summary()
    assert [found[name] for name in ("prefill_ms_low", "prefill_ms", "prefill_ms_high")] == [2.0, 3.0, 4.0]
    assert found["decode_ms"] == found["decode_ms_low"] == 0.5
    with pytest.raises(ValueError, match="repeats=1 have no quartiles"):
        interleaved_times([], tokens=1, repeats=1)
