"""The L2-norm strategy (Devoto et al., 2024, arXiv:2406.11430): keys of a small norm draw attention, so they stay.

As in the paper the first two layers keep every token, because there norm and attention are hardly related. A rotation
does not change a key's norm. Ours: budgets are shares that grow with the answer, and at least the newest token stays.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamic_llava.methods.eviction import TopSlots
from dynamic_llava.methods.evidence import SlotEvidence, Slots


@dataclass(frozen=True)
class KNorm(TopSlots):
    """Evict per key head the tokens whose keys have the largest norms."""

    name: ClassVar[str] = "knorm"
    score_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"key_norm"})

    layer: int = 2
    """The first decoder layer that evicts; earlier ones keep every token."""

    def score(self, slots: Slots) -> Tensor:
        """(B, K, W) float32: minus the norm of each key."""
        return -slots.seen["key_norm"]
