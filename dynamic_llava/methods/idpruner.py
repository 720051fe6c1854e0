"""IDPruner (Tan et al., 2026, arXiv:2602.13315): image tokens that matter and are unlike those already chosen.

Before the language model, text unseen: maximal marginal relevance. The first token is the most important one; each next
one has the highest `importance_weight` times its importance, minus the rest of 1 times its likeness (cosine of
projected features) to the most similar chosen one. Importance is scaled to run from 0 to 1 within an image.
Source: Tencent/AngelSlim 17d3d92, angelslim/compressor/token_compressor/algorithm/idpruner.py. Ours: importance is the
attention of the class token in the layer whose features the projector reads, where the published one is the score of
a network that VisionSelector trained for each model, so that the published figures are not those of this method;
budgets are rounded down; ties go to the earlier token; kept tokens keep their positions.
Shape suffixes: I images, n image tokens, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget

SMALL = 1e-6
"""Keeps the scale of importance finite, as published."""


@dataclass(frozen=True)
class IDPruner(Method):
    """Training-free here: importance against likeness, one token after another; output tokens all stay."""

    name: ClassVar[str] = "idpruner"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    importance_weight: float = 0.5
    """Weight of importance, from 0 to 1; likeness has the rest of 1."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        if isinstance(self.importance_weight, bool) or not 0 <= self.importance_weight <= 1:
            raise ValueError(f"importance_weight={self.importance_weight!r} is no weight; give a number from 0 to 1")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, frozenset({"class_row"})),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) patches of each image."""
        row_In = images.seen["class_row"]
        keep_In = torch.zeros_like(images.valid)
        if not keep_In.numel():
            return keep_In
        least_I1, most_I1 = (edge(row_In, dim=-1, keepdim=True) for edge in (torch.amin, torch.amax))
        score_In = importance_In = (row_In - least_I1) / (most_I1 - least_I1 + SMALL)
        unit_InD = F.normalize(images.hidden.float(), dim=-1)
        nearest_In = torch.full_like(row_In, -torch.inf)
        for _ in range(budget(self.image_keep_rate, row_In.shape[1])):
            chosen_I1 = score_In.masked_fill(keep_In, -torch.inf).argmax(-1, keepdim=True)
            keep_In = keep_In.scatter(1, chosen_I1, True)
            chosen_I1D = unit_InD.gather(1, chosen_I1[..., None].expand(-1, -1, unit_InD.shape[2]))
            nearest_In = torch.maximum(nearest_In, (unit_InD @ chosen_I1D.transpose(1, 2))[..., 0])
            score_In = self.importance_weight * importance_In - (1 - self.importance_weight) * nearest_In
        return keep_In
