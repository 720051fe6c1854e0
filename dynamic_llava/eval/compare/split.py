"""What a smaller picture solves already: VTC-Bench's split of a benchmark (arXiv:2510.07143), where `downsample` runs.

Group A are the questions that the dense method answers right and the downsampling one wrong, group B those that both
answer right; what dense answers wrong is in neither. A method's share of right answers in A says what it keeps that a
smaller picture loses; on B all it can do is lose something.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_llava.eval.metrics.tally import Tally

GROUPS = ("a", "b")


@dataclass(frozen=True)
class Split:
    """The units of a task in two groups."""

    names: tuple[str, ...]
    """All units, those in neither group too."""
    members: Mapping[str, tuple[int, ...]]
    """Places of the units of each group."""
    unit: str

    @classmethod
    def of(cls, dense: Tally, downsampled: Tally) -> "Split | None":
        """Return the groups; None where nothing is right or wrong, or the two have other units."""
        if dense.right is None or downsampled.right is None or dense.names != downsampled.names:
            return None
        both = list(zip(dense.right, downsampled.right, strict=True))
        places = {group: tuple(at for at, one in enumerate(both) if one == (True, group == "b")) for group in GROUPS}
        return cls(dense.names, places, dense.unit)

    def to_json(self, dense: str, downsampled: str) -> dict[str, Any]:
        """Return what compare.json says of the task: whose answers part it, and how many units each group has."""
        sizes = {group: len(places) for group, places in self.members.items()}
        neither = len(self.names) - sum(sizes.values())
        return {"dense": dense, "downsampled": downsampled, "unit": self.unit, **sizes, "neither": neither}

    def right_of(self, tally: Tally | None) -> dict[str, int]:
        """Return how many units of each group a method answers right; nothing where it has other units."""
        if tally is None or tally.right is None or tally.names != self.names:
            return {}
        return {group: sum(tally.right[at] for at in places) for group, places in self.members.items()}


def share(row: Mapping[str, Any], split: Mapping[str, Any], group: str) -> float | None:
    """Return the percentage of a group that a row answers right; None where it is not known, or the group is empty."""
    right, size = row.get("groups", {}).get(group), split[group]
    return None if right is None or not size else 100 * right / size


def said_of(split: Mapping[str, Any]) -> str:
    """Say what the groups of a task are."""
    return (
        f"A: {split['a']} {split['unit']} that {split['dense']} answers right and {split['downsampled']} wrong; "
        f"B: {split['b']} that both answer right; {split['neither']} are in neither"
    )


def joined(splits: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the split of several seeds, their units counted together; None where a seed has none."""
    known = [one for one in splits if one is not None]
    if not known or len(known) < len(splits):
        return None
    return {**known[0], **{name: sum(one[name] for one in known) for name in (*GROUPS, "neither")}}
