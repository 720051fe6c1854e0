"""HoloV (Zou et al., NeurIPS 2025): the budget is shared out among parts of the image, and spent by attention in each.

Before the language model, text unseen. The patches are cut, row by row, into 16 parts. A patch scores a thousand times
the attention that the class token pays it, plus 0.09 times how much its likeness (cosine of projected features) to the
others of its part varies, scaled to the part's attention; a part scores the mean of its patches. It gets the budget's
share of its score, rounded down; what is left over goes, a token each, to the parts of the highest scores. In a part
the most attended patches stay. Because the variation is scaled to the attention before the mean is taken, a part's
score is 1.09 times a thousand times its mean attention, so that in effect attention alone shares the budget out.
Source: obananas/HoloV 1d2e65e, llava/model/utils.py and llava_arch.py (a budget of 64, written there). Ours: what a
part cannot take goes to the others, a token each by their scores, where theirs fills up with zero vectors; a part of
one patch scores as the others do, a thousand times its attention; kept patches keep their positions, where theirs stand
by attention within a part and close up.
Shape suffixes: I images, n image tokens, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget, top_k_keep

SMALL = 1e-6
"""Keeps divisions finite, as published."""


@dataclass(frozen=True)
class HoloV(Method):
    """Training-free: every part of an image keeps its most attended patches, within a share of the budget."""

    name: ClassVar[str] = "holov"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    image_parts: int = 16
    """Parts that an image is cut into; fewer where it has fewer patches."""
    variation: float = 0.09
    """Weight of the variation of likeness beside attention."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        if isinstance(self.image_parts, bool) or not isinstance(self.image_parts, int) or self.image_parts < 1:
            raise ValueError(f"image_parts={self.image_parts!r} is no number of parts; give an int of 1 or more")
        if isinstance(self.variation, bool) or not self.variation >= 0:
            raise ValueError(f"variation={self.variation!r} is no weight; give a number of 0 or more")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, frozenset({"class_row"})),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) patches of each image."""
        row_In, patches = images.seen["class_row"], images.valid.shape[1]
        parts = min(self.image_parts, patches)
        number = torch.arange(parts, device=row_In.device)
        sizes = patches // parts + (number < patches % parts).long()
        part_n = number.repeat_interleave(sizes)
        score_In = 1e3 * row_In + self.variation * variations(images.hidden, 1e3 * row_In, part_n, sizes)
        quotas = shared_out(part_means(score_In, part_n, sizes), sizes, budget(self.image_keep_rate, patches))
        by_attention_In = row_In.sort(dim=-1, descending=True, stable=True).indices
        by_part_In = by_attention_In.gather(1, part_n[by_attention_In].sort(dim=-1, stable=True).indices)
        place_In = torch.empty_like(by_part_In).scatter(
            1, by_part_In, torch.arange(patches, device=row_In.device).expand_as(by_part_In)
        )
        return place_In - (sizes.cumsum(0) - sizes)[part_n] < quotas[:, part_n]


def part_means(values_In: Tensor, part_n: Tensor, sizes: Tensor) -> Tensor:
    """(I, parts) float: the mean of the patches of each part, which `part_n` (n,) int64 numbers."""
    sums = values_In.new_zeros(len(values_In), len(sizes)).index_add(1, part_n, values_In)
    return sums / sizes


def variations(hidden_InD: Tensor, attention_In: Tensor, part_n: Tensor, sizes: Tensor) -> Tensor:
    """(I, n) float: how a patch's likeness to the others of its part varies, scaled to the part's attention.

    As published, the likeness to itself counts as zero.
    """
    unit_InD = F.normalize(hidden_InD.float(), dim=-1)
    others_nn = part_n[:, None] == part_n
    others_nn = others_nn & ~torch.eye(len(part_n), dtype=torch.bool, device=part_n.device)
    count_n = (sizes - 1).clamp(min=1)[part_n]
    alike_Inn = unit_InD @ unit_InD.transpose(1, 2) * others_nn
    mean_In = alike_Inn.sum(-1) / count_n
    apart_Inn = (alike_Inn - mean_In[..., None]).square() * others_nn
    varies_In = (apart_Inn.sum(-1) + mean_In.square()) / count_n
    scale = part_means(attention_In.abs(), part_n, sizes) / (part_means(varies_In, part_n, sizes) + SMALL)
    return varies_In * scale[:, part_n]


def shared_out(scores: Tensor, sizes: Tensor, total: int) -> Tensor:
    """(I, parts) int64: how many of `total` tokens each part of an image gets, by (I, parts) scores and its size."""
    shares = scores / (scores.sum(1, keepdim=True) + SMALL)
    quotas = torch.minimum((shares * total).floor().long(), sizes)
    while bool((missing := total - quotas.sum(1)).any()):
        quotas = quotas + top_k_keep(shares, missing, valid=quotas < sizes)
    return quotas
