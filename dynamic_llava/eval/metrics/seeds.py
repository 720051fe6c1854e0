"""Mean and interval over seeds: Student's t, of which standard library and nothing else is needed."""

import math
from collections.abc import Sequence


def student_t_probability(t: float, degrees: int) -> float:
    """P(-t <= T <= t) for Student's t with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cos_squared = math.cos(theta) ** 2
    if degrees % 2:
        term = series = math.cos(theta) if degrees > 1 else 0.0
        for k in range(2, degrees - 2, 2):
            term *= cos_squared * k / (k + 1)
            series += term
        return 2 / math.pi * (theta + math.sin(theta) * series)
    term = series = 1.0
    for k in range(1, degrees - 2, 2):
        term *= cos_squared * k / (k + 1)
        series += term
    return math.sin(theta) * series


def student_t_quantile(level: float, degrees: int) -> float:
    """The t with P(-t <= T <= t) = level, by bisection; ValueError outside 0 < level < 1 or degrees < 1."""
    if not 0 < level < 1 or degrees < 1:
        raise ValueError(f"level={level}, degrees={degrees}: give a level in (0, 1) and at least one degree of freedom")
    low, high = 0.0, 1.0
    while student_t_probability(high, degrees) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_probability(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half-width of the two-sided t-interval of the mean; the half-width is None for a single value.

    ValueError when no value is given.
    """
    if not values:
        raise ValueError("no values were given; a mean needs at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, student_t_quantile(level, len(values) - 1) * math.sqrt(variance / len(values))
