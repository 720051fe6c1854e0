"""Paired bootstrap: how far the difference of two scores on the same questions could be chance of the questions.

Units are drawn with replacement, the same ones for every method, and both scores are computed anew of each draw,
whatever they are: means, F1, points. The interval is that of percentiles.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from dynamic_llava.eval.metrics.tally import Tally

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
"""Number of draws, share of them that an interval holds, and seed of the draws."""
_AT_ONCE = 4_000_000
"""Counts that are held in memory at once."""


def paired_intervals(
    reference: Tally, others: Sequence[Tally], *, name: str, seed: int = SEED, resamples: int = RESAMPLES
) -> list[tuple[float, float] | None]:
    """Return for each score the interval of its difference to the reference; None where it has other units.

    The draws depend on `name` (of the task), the seed and the number of units alone, so that neither the other methods
    nor their order change an interval.
    """
    units = len(reference.names)
    paired = [other.names == reference.names and other.groups == reference.groups for other in others]
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    differences: list[list[np.ndarray]] = [[] for _ in others]
    left = resamples
    while left:
        rows = min(left, max(1, _AT_ONCE // units))
        left -= rows
        drawn = generator.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        base = reference.value(weights)
        for place, other in enumerate(others):
            if paired[place]:
                differences[place].append(other.value(weights) - base)
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    return [
        tuple(map(float, np.quantile(np.concatenate(its), tails))) if its else None  # type: ignore[misc]
        for its in differences
    ]
