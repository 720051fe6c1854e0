"""From an asked keep rate to a threshold: a predictor's margins on held data, kept with the model as quantiles.

In training the keep rate is that of noisy samples; the rate at a fixed threshold is another one, and drifts from it.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

KINDS = ("image", "output")
"""Whose margins: those of the image and of the output predictor."""


def threshold_at(quantiles: Sequence[float], rate: float) -> float:
    """Return the threshold that a share `rate` of the measured margins exceeds; infinite where all or none stay.

    quantiles: of equal steps, ascending, the smallest and the largest margin included. ValueError for no share.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} is no share; give a number from 0 to 1")
    if rate in (0, 1):
        return math.inf if rate == 0 else -math.inf
    place = (1 - rate) * (len(quantiles) - 1)
    below = min(int(place), len(quantiles) - 2)
    return quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])


def check_calibration(value: Any) -> None:
    """Raise ValueError unless `value` is None or {kind: ascending finite numbers}, as `calibrate` writes it."""
    if value is None:
        return
    remedy = "run python -m dynamic_llava.calibrate again, or remove it from the checkpoint's config.json"
    if not isinstance(value, Mapping) or not set(value) <= set(KINDS):
        raise ValueError(f"calibration={str(value)[:80]} is no mapping of {KINDS} to quantiles; {remedy}")
    for kind, quantiles in value.items():
        numbers = isinstance(quantiles, Sequence) and not isinstance(quantiles, str) and len(quantiles) > 1
        if not numbers or not all(_finite(one) for one in quantiles):
            raise ValueError(f"calibration of {kind!r} is not a list of two or more finite numbers; {remedy}")
        if any(low > high for low, high in pairwise(quantiles)):
            raise ValueError(f"calibration of {kind!r} does not ascend; {remedy}")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
