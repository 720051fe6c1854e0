"""VisionZip (Yang et al., CVPR 2025, arXiv:2412.04467): patches that the class token attends to, and a few merged ones.

Before the projector, text unseen, by the layer of the vision tower whose features the projector reads. Dominant patches
are those of the highest attention. Of the others every so many-th, counted from the first, is a contextual one; each
patch that is neither goes to the contextual one whose keys are most like its own (cosine of the mean over heads), and a
contextual patch becomes the sum of its features and the mean of those that went to it. The projector makes tokens of
the result. The published budgets of 192, 128 and 64 tokens (rates 0.3334, 0.2223 and 0.1112 of 576) hold 162, 108 and
54 dominant ones: 27 of 32.
Source: dvlab-research/VisionZip 3151f6d, visionzip/clip_encoder.py. Ours: the class token, which theirs keeps as one of
the dominant tokens, is no image token here, so as many patches stay instead; contextual tokens stand at their patch's
place and kept ones keep their positions, where theirs put dominant tokens first and close up.
Shape suffixes: I images, n image tokens, m image tokens left that are contextual, d head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Choice, Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget, top_k_keep


@dataclass(frozen=True)
class VisionZip(Method):
    """Training-free: dominant patches stay, the others are merged into contextual ones."""

    name: ClassVar[str] = "visionzip"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Number of tokens that each image becomes, as a share of its patches."""
    dominant_share: float = 0.84375
    """Share of those that are dominant; the others are contextual."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        check_keep_rate("dominant_share", self.dominant_share)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the projector."""
        return (Cut(0, frozenset({"class_row", "tower_keys"}), before_projector=True),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """The dominant and contextual patches of each image, and to which contextual one each other goes."""
        row_In = images.seen["class_row"]
        total = budget(self.image_keep_rate, row_In.shape[1])
        dominant = budget(self.dominant_share, total)
        dominant_In = top_k_keep(row_In, dominant)
        if dominant == total:
            return dominant_In
        rest_In = (~dominant_In).nonzero()[:, 1].view(len(row_In), -1)
        step = rest_In.shape[1] // (total - dominant)
        contextual_Im = rest_In[:, ::step][:, : total - dominant]
        keep_In = dominant_In.scatter(1, contextual_Im, True)
        into_In = nearest(images.seen["tower_keys"], contextual_Im)
        went_In = torch.zeros_like(row_In).scatter_add(1, into_In, (~keep_In).to(row_In.dtype))
        weight_In = torch.where(keep_In, 1.0, 1 / went_In.gather(1, into_In).clamp(min=1))
        return Choice(keep_In, into=into_In, weight=weight_In)


def nearest(keys_Ind: Tensor, contextual_Im: Tensor) -> Tensor:
    """(I, n) int64: of the patches `contextual_Im`, (I, m) int64, the one that each patch is most like."""
    unit_Ind = F.normalize(keys_Ind.float(), dim=-1)
    unit_Imd = unit_Ind.gather(1, contextual_Im[..., None].expand(-1, -1, unit_Ind.shape[2]))
    return contextual_Im.gather(1, (unit_Ind @ unit_Imd.transpose(1, 2)).argmax(-1))
