"""FastV on the image and H2O on the answer: the pair that the paper sets beside Dynamic-LLaVA's two (Table 3, A.4.2).

FastV (fastv.py) drops image tokens at its layer, by the attention of the question's last token. Of the output tokens
each key head of every layer then keeps its newest and, of the others, those that have received the most attention
(h2o.py), half of them all together by default; what FastV leaves of the prompt stays stored. The paper's tables have
layer 3 and a keep rate of 0.25, the defaults here; its text once says 0.5. How the half is divided is not published.
Shape suffixes: I images, n image tokens, B rows, K key heads, W slots of a cache.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import BudgetKind, Cut, ImageTokens, Method, SlotEvidence, Slots
from dynamic_llava.methods.eviction import check_share, share
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class FastVH2O(Method):
    """Training-free: image tokens by one attention row, stored output tokens by what they have received."""

    name: ClassVar[str] = "fastv_h2o"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"mass", "output"})

    image_layer: int = 3
    """The first layer that sees only kept image tokens; output tokens are evicted in all layers."""
    image_keep_rate: float = 0.25
    """Share of each image's tokens that stays."""
    heavy_rate: float = 0.25
    """Share of the output tokens that stay as heavy hitters, from 0 to 1."""
    recent_rate: float = 0.25
    """Share of the output tokens that stay because they are the newest, from 0 to 1; at least one does."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        check_share("heavy_rate", self.heavy_rate)
        check_share("recent_rate", self.recent_rate)

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The share of image tokens: when a prefill ends, nothing has been evicted."""
        return ("image_keep_rate",)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, at `image_layer`."""
        return (Cut(self.image_layer, frozenset({"question_row"})),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the highest-attended tokens of each image."""
        return top_k_keep(images.seen["question_row"], rate=self.image_keep_rate, valid=images.valid)

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool: all of the prompt; of the answer the newest and the heaviest, the older of two equal ones."""
        heavy, recent = Fraction(str(self.heavy_rate)), Fraction(str(self.recent_rate))
        recent_B = share(recent, slots.outputs)
        heavy_B = share(heavy + recent, slots.outputs) - recent_B
        output_BKW = slots.filled & slots.seen["output"]
        from_newest_BKW = output_BKW.flip(-1).cumsum(-1).flip(-1)
        recent_BKW = output_BKW & (from_newest_BKW <= recent_B.clamp(min=1)[:, None, None])
        heavy_BKW = top_k_keep(slots.seen["mass"], heavy_B[:, None], output_BKW & ~recent_BKW)
        return (slots.filled & ~output_BKW) | recent_BKW | heavy_BKW
