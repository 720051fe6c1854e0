"""StreamingLLM (Xiao et al., 2023, arXiv:2309.17453): each row keeps its first tokens, the attention sinks, and its
newest ones.

Four sinks, and the window of the published code's class (mit-han-lab/streaming-llm, StartRecentKVCache). Sinks and
window belong to the row's tokens, padding not counted: the first four are those of the system prompt. The published
code counts positions within the cache and rotates keys anew at every step; here a kept token keeps its position, as
everywhere in this library, which differs once a row is longer than the positions that the model was trained on.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import BudgetKind, Method
from dynamic_llava.methods.eviction import check_count
from dynamic_llava.methods.evidence import Slots


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Evict all but the first tokens and a window of the newest, in every layer and head alike."""

    name: ClassVar[str] = "streaming_llm"
    training_free: ClassVar[bool] = True

    sinks: int = 4
    """First tokens of each row that stay."""
    window: int = 512
    """Newest tokens of each row that stay."""

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, "number of tokens")
        check_count("window", self.window, "number of tokens")

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The window."""
        return ("window",) if budget == "kv-bytes" else ()

    def evict(self, layer: int, slots: Slots) -> Tensor:
        """(B, K, W) bool: the sinks, which never leave a row's first slots, and the window."""
        first_W = torch.arange(slots.filled.shape[-1], device=slots.filled.device) < self.sinks
        return first_W | slots.newest(self.window)
