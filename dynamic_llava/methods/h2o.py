"""H2O (Zhang et al., 2023, arXiv:2306.14048): each key head keeps its newest tokens and, of the older ones, those that
have received the most attention.

The published code (FMInference/H2O, h2o_hf) has two variants of one rule, and both are here. The one that simulates by
a mask fixes the numbers of heavy hitters and of recent tokens after the prefill, as shares of the prompt: the defaults
here. For "50 % in each of prefill and decoding", as the paper's Table 14 compares it, budgets grow with the answer:
`shares_of="tokens"` with both rates 0.25 (how the half is divided is not published). As there, keys keep the rotation
of the position that they were written with, evicted tokens never come back, and what an evicted token had received is
forgotten. Ours: attention is summed over the query heads of a key head, rows have budgets of their own, and at least
the newest token stays.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Method, SlotEvidence, Slots
from dynamic_llava.methods.eviction import check_count, check_share, check_shares_of, share
from dynamic_llava.sparsity.decisions import top_k_keep

GrowingOrFixed = Literal["prompt", "tokens"]


@dataclass(frozen=True)
class H2O(Method):
    """Evict per key head: the recent window and the heavy hitters stay."""

    name: ClassVar[str] = "h2o"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"mass"})

    heavy_rate: float = 0.1
    """Share of tokens that stay as heavy hitters, from 0 to 1."""
    recent_rate: float = 0.1
    """Share of tokens that stay because they are the newest, from 0 to 1."""
    shares_of: GrowingOrFixed = "prompt"
    """What the rates are shares of: of the prompt's tokens, images included, so that budgets stay fixed while an answer
    grows; or of all tokens so far, of those of the prompt and of the answers each."""
    layer: int = 0
    """The first decoder layer that evicts; earlier ones keep every token."""

    def __post_init__(self) -> None:
        check_share("heavy_rate", self.heavy_rate)
        check_share("recent_rate", self.recent_rate)
        check_shares_of(self.shares_of, GrowingOrFixed)
        check_count("layer", self.layer, "decoder layer")

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """Both rates."""
        return ("heavy_rate", "recent_rate") if budget == "kv-bytes" else ()

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool: the recent window and, of the tokens before it, the heaviest; the older of two equal ones."""
        if layer < self.layer:
            return None
        heavy_B, recent_B = self.budgets(slots.tokens - slots.outputs, slots.outputs)
        recent_BKW = slots.newest(recent_B)
        return recent_BKW | top_k_keep(slots.seen["mass"], heavy_B[:, None], slots.filled & ~recent_BKW)

    def budgets(self, prompt_B: Tensor, outputs_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many heavy hitters and recent tokens stay in each row, (B,), (B,) int64, exact in decimals."""
        heavy, recent = Fraction(str(self.heavy_rate)), Fraction(str(self.recent_rate))
        if self.shares_of == "prompt":
            return share(heavy, prompt_B), share(recent, prompt_B).clamp(min=1)
        # Rounded as one share, so that heavy hitters and recent tokens together are what the rates together leave.
        both_B, recent_B = (share(one, prompt_B) + share(one, outputs_B) for one in (heavy + recent, recent))
        return both_B - recent_B, recent_B.clamp(min=1)
