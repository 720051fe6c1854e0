"""DivPrune (Alvar et al., CVPR 2025, arXiv:2503.02175): keep the image tokens that differ most from one another.

Before the language model, on projected features, text unseen: the max-min diversity problem, solved greedily. The first
token is the one whose nearest neighbour is farthest; each next one is farthest from all that are chosen. Distances are
one minus the cosine. Ours: budgets are rounded down, where the published code rounds, and positions are kept, where
theirs close up.
Shape suffixes: I images, n image tokens of the longest, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class DivPrune(Method):
    """Training-free choice of diverse image tokens before the language model; output tokens all stay."""

    name: ClassVar[str] = "divprune"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: of each image a diverse set of floor(rate * its tokens)."""
        return most_diverse(images.hidden, images.valid, self.image_keep_rate)


def most_diverse(features_InD: Tensor, valid_In: Tensor, rate: float) -> Tensor:
    """Choose a share of each image's valid tokens, greedily the farthest from those chosen; (I, n) bool."""
    unit_InD = F.normalize(features_InD.float(), dim=-1)
    apart_Inn = 1 - unit_InD @ unit_InD.transpose(1, 2)
    itself_nn = torch.eye(valid_In.shape[1], dtype=torch.bool, device=valid_In.device)
    others_Inn = apart_Inn.masked_fill(itself_nn | ~valid_In[:, None], torch.inf)
    gap_In = others_Inn.amin(-1)  # infinite for an image's only token
    order_In = torch.zeros_like(gap_In)
    left_In = valid_In.clone()
    for place in range(_longest(valid_In, rate)):
        chosen_I1 = gap_In.masked_fill(~left_In, -torch.inf).argmax(-1, keepdim=True)
        is_chosen_In = left_In & itself_nn[chosen_I1[:, 0]]  # none where an image has no token left
        order_In = torch.where(is_chosen_In, -float(place), order_In)
        left_In = left_In & ~is_chosen_In
        reached_In = apart_Inn.gather(1, chosen_I1[..., None].expand(-1, -1, apart_Inn.shape[2]))[:, 0]
        gap_In = reached_In if place == 0 else torch.minimum(gap_In, reached_In)
    never_In = torch.full_like(order_In, -torch.inf)
    return top_k_keep(torch.where(left_In, never_In, order_In), rate=rate, valid=valid_In)


def _longest(valid_In: Tensor, rate: float) -> int:
    """The largest budget of any image."""
    tokens = valid_In.sum(1)
    everything_In = torch.zeros(valid_In.shape, device=valid_In.device)
    return int(top_k_keep(everything_In, rate=rate, valid=valid_In).sum(1).max()) if len(tokens) else 0
