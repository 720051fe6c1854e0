"""TOVA (Oren et al., 2024, arXiv:2401.06104): what the newest token attends to least is evicted.

The score of a stored token is the attention that it receives from the newest token, the mean over all heads of a layer,
so that the heads of a layer evict the same tokens. The paper fixes the number of stored tokens; here it is a share, of
the prompt by default, which is as fixed. After a prefill the newest token is the prompt's last. Ours: at least the
newest token stays.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamic_llava.methods.eviction import SharesOf, TopSlots
from dynamic_llava.methods.evidence import SlotEvidence, Slots


@dataclass(frozen=True)
class TOVA(TopSlots):
    """Evict, in all heads of a layer alike, what the newest token attends to least."""

    name: ClassVar[str] = "tova"
    score_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"latest"})

    shares_of: SharesOf = "prompt"

    def score(self, slots: Slots) -> Tensor:
        """(B, K, W) float32: attention from the newest token, the mean over key heads."""
        latest_BKW = slots.seen["latest"]
        return latest_BKW.mean(1, keepdim=True).expand_as(latest_BKW)
