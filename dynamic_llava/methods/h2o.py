"""H2O (Zhang et al., 2023, arXiv:2306.14048): each key head keeps its newest tokens and, of the older ones, those that
have received the most attention.

The published code (FMInference/H2O, h2o_hf) has two variants of one rule, and both are here. The one that simulates by
a mask fixes the numbers of heavy hitters and of recent tokens after the prefill, as shares of the prompt: the defaults
here. For "50 % in each of prefill and decoding", as the paper's Table 14 compares it, budgets grow with the answer:
`shares_of="tokens"` with both rates 0.25 (how the half is divided is not published). For FastV+H2O, which evicts of the
answer alone, `shares_of="outputs"` within `mixed` (mixed.py). As there, keys keep the rotation
of the position that they were written with, evicted tokens never come back, and what an evicted token had received is
forgotten. Ours: attention is summed over the query heads of a key head, rows have budgets of their own, and at least
the newest token stays.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Method
from dynamic_llava.methods.eviction import SharesOf, check_count, check_share, check_shares_of, share
from dynamic_llava.methods.evidence import SlotEvidence, Slots
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class H2O(Method):
    """Evict per key head: the recent window and the heavy hitters stay."""

    name: ClassVar[str] = "h2o"
    training_free: ClassVar[bool] = True

    heavy_rate: float = 0.1
    """Share of tokens that stay as heavy hitters, from 0 to 1."""
    recent_rate: float = 0.1
    """Share of tokens that stay because they are the newest, from 0 to 1."""
    shares_of: SharesOf = "prompt"
    """What the rates are shares of: of the prompt's tokens, images included, so that budgets stay fixed while an answer
    grows; of all tokens so far, of those of the prompt and of the answers each; or of the output tokens, while every
    token of the prompt stays."""
    layer: int = 0
    """The first decoder layer that evicts; earlier ones keep every token."""

    def __post_init__(self) -> None:
        check_share("heavy_rate", self.heavy_rate)
        check_share("recent_rate", self.recent_rate)
        check_shares_of(self.shares_of)
        check_count("layer", self.layer, "decoder layer")

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """Both rates, unless they are shares of answers alone, of which a prefill has none."""
        return ("heavy_rate", "recent_rate") if budget == "kv-bytes" and self.shares_of != "outputs" else ()

    @property
    def evict_sees(self) -> frozenset[SlotEvidence]:  # type: ignore[override]
        """The mass, and which tokens are output tokens where only those may leave."""
        return frozenset({"mass", "output"} if self.shares_of == "outputs" else {"mass"})

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool: the recent window and, of the tokens before it, the heaviest; the older of two equal ones."""
        if layer < self.layer:
            return None
        heavy_B, recent_B = self.budgets(slots.tokens - slots.outputs, slots.outputs)
        leaving_BKW = slots.filled & slots.seen["output"] if self.shares_of == "outputs" else slots.filled
        recent_BKW = slots.newest(recent_B)
        heavy_BKW = top_k_keep(slots.seen["mass"], heavy_B[:, None], leaving_BKW & ~recent_BKW)
        return recent_BKW | heavy_BKW | (slots.filled & ~leaving_BKW)

    def budgets(self, prompt_B: Tensor, outputs_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many heavy hitters and recent tokens stay in each row, (B,), (B,) int64, exact in decimals."""
        heavy, recent = Fraction(str(self.heavy_rate)), Fraction(str(self.recent_rate))
        if self.shares_of == "prompt":
            return share(heavy, prompt_B), share(recent, prompt_B).clamp(min=1)
        # Rounded as one share, so that heavy hitters and recent tokens together are what the rates together leave.
        counted = (prompt_B, outputs_B) if self.shares_of == "tokens" else (outputs_B,)
        both_B, recent_B = (
            sum((share(one, of_B) for of_B in counted), 0 * outputs_B) for one in (heavy + recent, recent)
        )
        return both_B - recent_B, recent_B.clamp(min=1)
