"""VisPruner (Zhang et al., ICCV 2025, arXiv:2412.01818), of which FasterVLM is the part that ranks by attention.

Decided by the vision tower alone, before the language model, text unseen. A share of the budget goes to the patches
that the class token attends to most. The others are listed by falling attention and thinned out: the list is dealt out
in turn to two halves, and of the first half the up to eight patches go whose nearest in the second is nearest, by the
cosine of the tower's features, until the rest of the budget is left. What stays of the first half then stands before
the second, nearest first. With important_ratio=1 nothing is thinned out: FasterVLM (arXiv:2412.01818, first version).
Source: Theia-4869/VisPruner aefa01a, llava/model/llava_arch.py; Theia-4869/FasterVLM f5d5f12. Ours: budgets are a
share, rounded down; kept patches keep their positions, where theirs close up; ties go to the earlier patch; a list of
odd length is dealt out too, where theirs has no shape for it.
Shape suffixes: I images, n image tokens, m image tokens left, F feature size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.methods.evidence import Evidence
from dynamic_llava.sparsity.decisions import budget

STEP = 8
"""Most patches that go in one round."""


@dataclass(frozen=True)
class VisPruner(Method):
    """Training-free: patches that matter to the class token, and among the others different ones."""

    name: ClassVar[str] = "vispruner"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    important_ratio: float = 0.5
    """Share of those that are chosen by attention, from 0 to 1; 1 is FasterVLM."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        if isinstance(self.important_ratio, bool) or not 0 <= self.important_ratio <= 1:
            raise ValueError(f"important_ratio={self.important_ratio!r} is no share; give a number from 0 to 1")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model; features are compared only where something is thinned out."""
        sees: set[Evidence] = {"class_row"} if self.important_ratio == 1 else {"class_row", "tower"}
        return (Cut(0, frozenset(sees)),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) patches of each image."""
        row_In = images.seen["class_row"]
        total = budget(self.image_keep_rate, row_In.shape[1])
        important = budget(self.important_ratio, total, minimum=0)
        order_In = row_In.sort(dim=-1, descending=True, stable=True).indices
        chosen_Im = order_In[:, :important]
        if important < total:
            unit_InF = F.normalize(images.seen["tower"].float(), dim=-1)
            chosen_Im = torch.cat([chosen_Im, thinned(unit_InF, order_In[:, important:], total - important)], dim=1)
        return torch.zeros_like(images.valid).scatter(1, chosen_Im, True)


def thinned(unit_InF: Tensor, list_Im: Tensor, count: int) -> Tensor:
    """Thin lists of patches, (I, m) int64, out until `count` are left of each; (I, count) int64."""
    while (surplus := list_Im.shape[1] - count) > 0:
        halves = first_Im, second_Im = list_Im[:, ::2], list_Im[:, 1::2]
        width = unit_InF.shape[2]
        one_ImF, other_ImF = (unit_InF.gather(1, half[..., None].expand(-1, -1, width)) for half in halves)
        nearest_Im = (one_ImF @ other_ImF.transpose(1, 2)).amax(-1)
        by_nearness_Im = nearest_Im.sort(dim=-1, descending=True, stable=True).indices[:, min(STEP, surplus) :]
        list_Im = torch.cat([first_Im.gather(1, by_nearness_Im), second_Im], dim=1)
    return list_Im
