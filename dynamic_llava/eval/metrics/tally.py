"""A score as sums over its units, so that it can be computed of any sample of them: what paired intervals are made of.

A unit is what a benchmark counts by: a question, or the questions that count together only (the two of MME's images,
MMVP's pairs, MMBench's rotations). Units belong to groups (POPE's categories); a group is worth a function of the sums
of its units' numbers, and the score is the mean or the sum over the groups that have any. Arrays come from the caller:
nothing is imported here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Tally:
    """What a metric is made of, unit by unit."""

    names: tuple[str, ...]
    """A name for each unit, by which it is the same unit in another model's answers."""
    groups: tuple[str, ...]
    """The group of each unit."""
    numbers: tuple[tuple[float, ...], ...]
    """What each unit adds to its group."""
    worth: Callable[[Any, Any], Any]
    """Value of a group from the sums of its units' numbers, (..., k), and the number of its units, (...), above 0."""
    over_groups: Literal["mean", "sum"] = "mean"
    unit: str = "questions"
    """What the units are, in the plural."""
    right: tuple[bool, ...] | None = None
    """Whether each unit was answered right, half right counting as right; None where nothing is right or wrong."""

    def value(self, weights: Any) -> Any:
        """Return the score (...) of samples in which each unit occurs so many times: a numpy array (..., units).

        Every sample holds at least one unit.
        """
        total, counted = 0.0, 0
        for group in dict.fromkeys(self.groups):
            own = [place for place, its in enumerate(self.groups) if its == group]
            weights_of = weights[..., own]
            count = weights_of.sum(-1)
            sums = weights_of @ [self.numbers[place] for place in own]
            total = total + self.worth(sums, count + (count == 0)) * (count > 0)
            counted = counted + (count > 0)
        return total / counted if self.over_groups == "mean" else total


def tally_of_means(
    values: Mapping[str, float] | Iterable[float],
    *,
    scale: float = 1.0,
    groups: Iterable[str] | None = None,
    unit: str = "questions",
    graded: bool = True,
) -> Tally:
    """Return the tally of the mean of one value a unit, times `scale`; with `groups`, of the mean of their means.

    Values without names are named by their places. graded: they run from 0, wrong, to 1, right.
    """
    named = dict(values) if isinstance(values, Mapping) else {str(place): one for place, one in enumerate(values)}
    return Tally(
        tuple(map(str, named)),
        ("",) * len(named) if groups is None else tuple(groups),
        tuple((float(value),) for value in named.values()),
        lambda sums, count: scale * sums[..., 0] / count,
        unit=unit,
        right=tuple(value >= 0.5 for value in named.values()) if graded else None,
    )
