"""A toy of the kind eviction: key heads take turns in which stored tokens they keep, beside the newest ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods import Method, SlotEvidence, Slots


@dataclass(frozen=True)
class Sieve(Method):
    """Each key head keeps the newest tokens, and every other one of those before: one head the even places, the next
    the odd ones.
    """

    name: ClassVar[str] = "sieve"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"place"})

    newest: int = 3
    """Newest tokens that stay."""

    def evict(self, layer: int, slots: Slots) -> Tensor:
        """(B, K, W) bool, from a token's place in its row."""
        head_K1 = torch.arange(slots.filled.shape[1], device=slots.filled.device)[:, None]
        return slots.newest(self.newest) | ((slots.seen["place"] + head_K1) % 2 == 0)
