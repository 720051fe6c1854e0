"""LLaVA-PruMerge+ (Shang et al., ICCV 2025, arXiv:2403.15388): outliers of the class token's attention, and a grid.

Before the projector, text unseen; each image gets as many tokens as it needs. Attention and keys are those of the
vision tower's last layer, its heads taken as one; the features are those that the projector reads, of the layer before.
An image's outliers are the patches whose attention is above the third quartile by more than 1.5 times the distance of
the quartiles. With r the share that they are of all n patches, every int(int(1 / r) / 3)-th patch, from the first to
the last but one, is kept beside them. Each kept patch becomes itself plus the features of the 32 other patches whose
keys are most like its own, kept ones among them, times the attention to them; and one more token is the sum of all
patches that are not kept, times theirs. With a share instead of "outliers" it is as many tokens of every image: half of
them by attention, the others at even distances, one the sum; so the published training divides its share of 1/8.
Source: 42Shawn/LLaVA-PruMerge 097c041, llava/model/multimodal_encoder/clip_encoder.py, its adaptive path, in training
too, where theirs keeps a fixed number. Ours: every image has outliers and a share of its own, where theirs pools those
of a batch; with none the most attended patch stands for them, and the step is 1 at least, where theirs divides by zero
or steps by it; the outliers are as many as were counted, where theirs multiplies their share out again; a share that is
set is rounded down and exact, its even distances are those of the patches not yet chosen, and the sum is one of its
tokens, where theirs takes some patches twice and adds the sum; tokens stand in raster order and keep their positions,
the one more token at the last patch that is not kept.
Shape suffixes: I images, n image tokens, F feature size of one layer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.methods.base import Choice, Cut, ImageTokens
from dynamic_llava.methods.outliers import OutlierRate, outliers
from dynamic_llava.sparsity.decisions import budget, top_k_keep


@dataclass(frozen=True)
class PruMergePlus(OutlierRate):
    """Training-free here: a number of tokens that each image says itself, merged by keys."""

    name: ClassVar[str] = "prumerge_plus"
    training_free: ClassVar[bool] = True

    neighbours: int = 32
    """How many other patches go into each kept one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours!r} is no number of patches; give an int of 1 or more")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the projector, by the tower's last layer."""
        return (Cut(0, frozenset({"joint_class_row", "joint_tower_keys"}), before_projector=True, tower_layer=-1),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """Which patches stay of each image, the one more token's among them, and what each becomes."""
        row_In, (count, patches) = images.seen["joint_class_row"], images.valid.shape
        rate = self.image_keep_rate
        kept_In = (
            outliers_and_grid(row_In) if isinstance(rate, str) else top_and_grid(row_In, budget(rate, patches) - 1)
        )
        shares_Inn = torch.eye(patches, device=row_In.device).repeat(count, 1, 1)
        if patches > 1:
            others = nearest_others(images.seen["joint_tower_keys"], min(self.neighbours, patches - 1))
            near_Inn = torch.zeros_like(shares_Inn).scatter(2, others, 1.0)
            shares_Inn = shares_Inn + near_Inn * row_In[:, None]
        place_n = torch.arange(patches, device=row_In.device)
        more_In = place_n == torch.where(kept_In, -1, place_n).amax(1, keepdim=True)
        rest_In = torch.where(kept_In, 0.0, row_In)
        return Choice(kept_In | more_In, shares=torch.where(more_In[..., None], rest_In[:, None], shares_Inn))


def outliers_and_grid(row_In: Tensor) -> Tensor:
    """(I, n) bool: of each image the outliers of its attention, and patches at even distances."""
    patches = row_In.shape[1]
    count_I = outliers(row_In).clamp(min=1)
    step_I = (patches // count_I // 3).clamp(min=1)
    place_n = torch.arange(patches, device=row_In.device)
    grid_In = (place_n % step_I[:, None] == 0) & (place_n < patches - 1)
    return top_k_keep(row_In, count_I) | grid_In


def top_and_grid(row_In: Tensor, count: int) -> Tensor:
    """(I, n) bool: so many patches of each image, half of them by attention, the others at even distances."""
    top = (count + 1) // 2
    top_In = top_k_keep(row_In, top)
    left, grid = row_In.shape[1] - top, count - top
    middles = (2 * torch.arange(grid, device=row_In.device) + 1) * left // max(2 * grid, 1)  # of equal parts
    is_even = torch.zeros(left, dtype=torch.bool, device=row_In.device).index_fill(0, middles, True)
    place_In = (~top_In).cumsum(1) - 1  # among the patches that are left
    return top_In | (is_even[place_In.clamp(min=0)] & ~top_In)


def nearest_others(keys_InF: Tensor, count: int) -> Tensor:
    """(I, n, count) int64: for each patch the others whose keys are most like its own, by the cosine."""
    unit_InF = F.normalize(keys_InF.float(), dim=-1)
    alike_Inn = unit_InF @ unit_InF.transpose(1, 2)
    itself_nn = torch.eye(alike_Inn.shape[1], dtype=torch.bool, device=alike_Inn.device)
    alike_Inn = alike_Inn.masked_fill(itself_nn, -torch.inf)
    return alike_Inn.sort(dim=-1, descending=True, stable=True).indices[..., :count]
