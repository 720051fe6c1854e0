"""Random eviction with a window: the control that a rule for stored tokens has to beat.

The newest tokens stay, and of the older ones a uniformly random choice: each token has a number drawn once, from the
seed, the layer-independent place of the token and nothing else, and the highest ones stay as the budget grows (as in
reservoir sampling). `shares_of="outputs"` drops output tokens alone, to compare with learned admission;
`keep_rate=0` leaves the bare window.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamic_llava.methods.eviction import TopSlots
from dynamic_llava.methods.evidence import SlotEvidence, Slots
from dynamic_llava.sparsity.noise import fold_key, uniform_noise


@dataclass(frozen=True)
class RandomWindow(TopSlots):
    """Evict tokens at random, in every layer and head alike, but none of the newest."""

    name: ClassVar[str] = "random_window"
    score_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"place"})

    recent: int = 8
    """Newest tokens of each row that stay, even beyond the budget."""
    seed: int = 0
    """Seed of the draw; rows of a batch share it, so that a row does not depend on its mates."""

    def score(self, slots: Slots) -> Tensor:
        """(B, K, W) float32: a number in (0, 1) for each token's place in its row."""
        place_BKW = slots.seen["place"]
        key_1 = fold_key(self.seed, device=place_BKW.device)
        return uniform_noise(key_1, place_BKW.flatten()).view(place_BKW.shape)
