"""What methods that evict stored tokens share: budgets of rows, and the best tokens of each head within them.

Shape suffixes: B rows, K key heads, W slots of a cache.
"""

from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Method
from dynamic_llava.methods.evidence import SlotEvidence, Slots
from dynamic_llava.sparsity.decisions import top_k_keep

SharesOf = Literal["prompt", "tokens", "outputs"]
"""What a share of stored tokens is a share of. prompt: the prompt's tokens, images included, so that budgets stay fixed
while an answer grows; tokens: those of the prompt and those of the answers, each; outputs: those of answers alone."""


def share(rate: float | Fraction, count_B: Tensor) -> Tensor:
    """(B,) int64: floor(rate * count), the rate as written, to four digits; count_B (B,) int64."""
    exact = Fraction(str(rate)).limit_denominator(10_000)  # keeps the product far from overflow
    return count_B * exact.numerator // exact.denominator


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is no share of the tokens; give a number from 0 to 1")


def check_count(name: str, value: Any, what: str, least: int = 0) -> None:
    """Raise ValueError unless `value` is an int of at least `least`; `what` says what it counts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is no {what}; give an int of {least} or more")


def check_shares_of(value: Any, allowed: Any = SharesOf) -> None:
    """Raise ValueError unless `value` is one of the names of `allowed`, a Literal."""
    if value not in get_args(allowed):
        raise ValueError(f"shares_of={value!r} is not known; choose one of {get_args(allowed)}")


@dataclass(frozen=True)
class TopSlots(Method):
    """Evict per key head: the newest tokens stay and, within the row's budget, those with the highest score."""

    training_free: ClassVar[bool] = True

    keep_rate: float = 0.5
    """Share of tokens that stay, from 0 to 1, the newest ones counted with it. The budget is floor(share * tokens)."""
    recent: int = 1
    """Newest tokens of each row that stay whatever their score, even beyond the budget."""
    shares_of: SharesOf = "tokens"
    """What `keep_rate` is a share of: of the prompt's tokens, images included, a budget which does not grow with the
    answer; of all tokens so far, those of the prompt and of the answers each; or of the output tokens, while every
    token of the prompt stays."""
    layer: int = 0
    """The first decoder layer that evicts; earlier ones keep every token."""

    def __post_init__(self) -> None:
        check_share("keep_rate", self.keep_rate)
        check_count("recent", self.recent, "number of tokens", least=1)
        check_count("layer", self.layer, "decoder layer")
        check_shares_of(self.shares_of)

    @property
    def evict_sees(self) -> frozenset[SlotEvidence]:  # type: ignore[override]
        """What the score is made of, and which tokens are output tokens where only those may leave."""
        return self.score_sees | ({"output"} if self.shares_of == "outputs" else frozenset())

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """`keep_rate`, unless it is a share of answers alone, of which a prefill has none."""
        return ("keep_rate",) if budget == "kv-bytes" and self.shares_of != "outputs" else ()

    score_sees: ClassVar[frozenset[SlotEvidence]] = frozenset()
    """What `score` is shown in `Slots.seen`."""

    @abstractmethod
    def score(self, slots: Slots) -> Tensor:
        """(B, K, W) float: the higher, the rather a stored token stays; whatever at unfilled slots."""

    def evict(self, layer: int, slots: Slots) -> Tensor | None:
        """(B, K, W) bool: the newest tokens, and the best of those that may leave; the older of two equal ones."""
        if layer < self.layer:
            return None
        leaving_BKW = slots.filled
        if self.shares_of == "outputs":
            leaving_BKW = leaving_BKW & slots.seen["output"]
        recent_BKW = slots.newest(self.recent)
        room_BK = self.budget(slots)[:, None] - (recent_BKW & leaving_BKW).sum(-1)
        best_BKW = top_k_keep(self.score(slots), room_BK.clamp(min=0), leaving_BKW & ~recent_BKW)
        return recent_BKW | best_BKW | (slots.filled & ~leaving_BKW)

    def budget(self, slots: Slots) -> Tensor:
        """(B,) int64: how many of the tokens that may leave stay in each row."""
        prompt_B = slots.tokens - slots.outputs
        counted = {"prompt": (prompt_B,), "tokens": (prompt_B, slots.outputs), "outputs": (slots.outputs,)}
        return sum((share(self.keep_rate, count_B) for count_B in counted[self.shares_of]), 0 * prompt_B)
