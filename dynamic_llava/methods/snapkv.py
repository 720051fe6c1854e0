"""SnapKV (Li et al., 2024, arXiv:2404.14469): the prompt is compressed once, by what its last tokens attend to.

The attention that a token receives from the last `window` tokens of the prompt, averaged over its neighbours by a
pooling of `kernel` tokens without those of the window, decides; the window stays. Defaults of the published code
(FasterDecoding/SnapKV): window 64, average pooling over 5. There a head keeps a fixed number of tokens; here a share of
the prompt, the window counted with it. Ours: attention is summed over the query heads of a key head. An answer's tokens
all stay, and so does everything from then on: a later user turn is not compressed.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from dynamic_llava.methods.base import Method
from dynamic_llava.methods.eviction import check_count, check_share, share
from dynamic_llava.methods.evidence import SlotEvidence, Slots
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class SnapKV(Method):
    """Evict per key head, once, the tokens of the prompt that its end attends to least."""

    name: ClassVar[str] = "snapkv"
    training_free: ClassVar[bool] = True
    evict_sees: ClassVar[frozenset[SlotEvidence]] = frozenset({"latest"})

    keep_rate: float = 0.5
    """Share of the prompt's tokens that stay, from 0 to 1, the window counted with it."""
    window: int = 64
    """Last tokens of the prompt: they are asked what they attend to, and stay, even beyond the budget."""
    kernel: int = 5
    """Tokens that attention is averaged over; an odd number, and 1 averages nothing."""

    def __post_init__(self) -> None:
        check_share("keep_rate", self.keep_rate)
        check_count("window", self.window, "number of tokens", least=1)
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or not self.kernel % 2:
            raise ValueError(f"kernel={self.kernel!r} has no middle token; give an odd int of 1 or more")

    @property
    def latest_queries(self) -> int:
        """The window."""
        return self.window

    def evict(self, layer: int, slots: Slots) -> Tensor:
        """(B, K, W) bool: the window and the best tokens before it; everything in rows that have begun to answer."""
        window_BKW = slots.newest(self.window)
        older_BKW = slots.filled & ~window_BKW
        received_BKW = slots.seen["latest"].masked_fill(~older_BKW, 0.0)
        score_BKW = avg_pool1d(received_BKW, self.kernel, stride=1, padding=self.kernel // 2)
        room_BK = share(self.keep_rate, slots.tokens)[:, None] - window_BKW.sum(-1)
        stay_BKW = window_BKW | top_k_keep(score_BKW, room_BK.clamp(min=0), older_BKW)
        return stay_BKW | (slots.outputs > 0)[:, None, None]
