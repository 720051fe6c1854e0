"""Slots: how much of what was said before a token it still sees; what rules over output tokens are compared at.

Of an answer a token sees the tokens before it that were kept and, with a window, the last ones whatever was decided.
The share is of all pairs of a token and one said before it, of all answers together: what the cache holds of outputs on
average while they are said. Standard library only.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate


def seen_pairs(kept: Sequence[bool], window: int = 0) -> tuple[int, int]:
    """Return how many pairs of an answer's tokens see one another, and how many pairs there are.

    `kept` is the decision on each token of the answer, in order.
    """
    before = [0, *accumulate(map(int, kept))]
    seen = sum(before[max(0, place - window)] + min(place, window) for place in range(len(kept)))
    return seen, len(kept) * (len(kept) - 1) // 2


def slots(answers: Iterable[Sequence[bool]], window: int = 0) -> float:
    """Return the share of past tokens that the tokens of the answers see; 1 where no token has a past."""
    seen, pairs = (sum(part) for part in zip((0, 0), *(seen_pairs(kept, window) for kept in answers), strict=True))
    return seen / pairs if pairs else 1.0


def window_of(lengths: Sequence[int], share: float, sinks: int) -> int:
    """Return the smallest window that, with the first `sinks` tokens of each answer, shows at least `share` of it.

    `lengths` are those of the answers.
    """
    rows = [[place < sinks for place in range(length)] for length in lengths]
    return bisect_left(range(max(lengths, default=0)), share, key=lambda window: slots(rows, window))


def chance_of(lengths: Sequence[int], share: float, window: int) -> float:
    """Return the probability with which tokens stay for a window to show `share` of the answers in expectation.

    `lengths` are those of the answers; 0 where the window shows as much by itself.
    """
    alone = slots(([False] * length for length in lengths), window)
    return max(0.0, (share - alone) / (1 - alone)) if alone < 1 else 0.0
