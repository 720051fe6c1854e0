"""HiPrune (Liu et al., 2025, arXiv:2508.00553): patches that two depths of the vision tower attend to.

Decided by the vision tower alone, before the language model, text unseen, by the attention that a patch receives: the
mean over heads and over all of the tower's tokens, the class token among them. In a middle layer, where objects stand
out, the patches that receive most are anchors, a fiftieth of the budget, rounded; their neighbours in the grid, left,
right, above and below, stay with them. The rest of the budget goes to the patches that receive most in the layer whose
features the projector reads. The published middle layer is the 9th of 24; here it is said as a share of the depth.
Source: Danielement321/HiPrune, LLaVA/llava/model/llava_arch.py, as in mmdbhs/HiPrune-fork 78324f3. Ours: each image has
a whole budget, a share rounded down, where theirs divides one among the images of a batch; neighbours are those of the
grid, where theirs run on from one end of a row to the next, and past the first and last patch stand for these; where
anchors and neighbours are more than the budget, those neighbours stay that receive most; kept patches keep their
positions, where theirs close up.
Shape suffixes: I images, n image tokens.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget, top_k_keep

CROSS = 5
"""An anchor and its neighbours."""


@dataclass(frozen=True)
class HiPrune(Method):
    """Training-free: anchors of a middle layer with their neighbours, and what a deep layer attends to."""

    name: ClassVar[str] = "hiprune"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    object_share: float = 0.1
    """Share of those that are anchors and their neighbours, from 0 to 1."""
    object_depth: float = 0.375
    """How deep in the tower the middle layer is, from 0 to 1: layer 9 of 24."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        for name in ("object_share", "object_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is no share; give a number from 0 to 1")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, frozenset({"received", "early_received"}), early_depth=self.object_depth),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) patches of each image."""
        early_In, patches = images.seen["early_received"], images.valid.shape[1]
        total = budget(self.image_keep_rate, patches)
        anchors = min(total, round(total * self.object_share / CROSS))
        anchor_In = top_k_keep(early_In, anchors)
        beside_In = neighbours(anchor_In) & ~anchor_In
        kept_In = anchor_In | top_k_keep(early_In, total - anchors, valid=beside_In)
        return kept_In | top_k_keep(images.seen["received"], total - kept_In.sum(1), valid=~kept_In)


def neighbours(chosen_In: Tensor) -> Tensor:
    """(I, n) bool: the patches left, right, above and below of chosen ones, in a square grid row by row."""
    side = math.isqrt(chosen_In.shape[1])
    grid = F.pad(chosen_In.unflatten(1, (side, side)), (1, 1, 1, 1))
    rows, columns = grid[:, :, 1:-1], grid[:, 1:-1]
    return (rows[:, 2:] | rows[:, :-2] | columns[:, :, 2:] | columns[:, :, :-2]).flatten(1)
