"""SCOPE (Deng et al., NeurIPS 2025, arXiv:2510.24214): patches that matter to the class token and cover the others.

Decided by the vision tower alone, before the language model, text unseen. A patch is covered as far as the most similar
chosen one is like it (cosine of the tower's features, 0 before anything is chosen). Patches are chosen one by one, each
time the one of the highest product of what it would add to the coverage of all, and the class token's attention to it.
Source: kinredon/SCOPE a01b98f, scope/clip_encoder.py, with its default exponent of attention, 1, and product. Ours:
each image has its whole budget, a share rounded down, where theirs divides one among the images of a batch; kept
patches keep their positions, where theirs close up; ties go to the earlier patch.
Shape suffixes: I images, n image tokens, F feature size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget


@dataclass(frozen=True)
class SCOPE(Method):
    """Training-free choice of patches by saliency and coverage; output tokens all stay."""

    name: ClassVar[str] = "scope"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    saliency: float = 1.0
    """Exponent of the attention; 0 chooses by coverage alone."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        if isinstance(self.saliency, bool) or not self.saliency >= 0:
            raise ValueError(f"saliency={self.saliency!r} is no exponent; give a number of 0 or more")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, frozenset({"class_row", "tower"})),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) patches of each image."""
        weight_In = images.seen["class_row"] ** self.saliency
        unit_InF = F.normalize(images.seen["tower"].float(), dim=-1)
        alike_Inn = unit_InF @ unit_InF.transpose(1, 2)
        covered_In = torch.zeros_like(weight_In)
        keep_In = torch.zeros_like(images.valid)
        for _ in range(budget(self.image_keep_rate, weight_In.shape[1])):
            gain_In = (alike_Inn - covered_In[:, None]).clamp(min=0).sum(-1) * weight_In
            chosen_I1 = gain_In.masked_fill(keep_In, -torch.inf).argmax(-1, keepdim=True)
            keep_In = keep_In.scatter(1, chosen_I1, True)
            covered_In = torch.maximum(covered_In, alike_Inn[torch.arange(len(chosen_I1)), chosen_I1[:, 0]])
        return keep_In
