"""Downsampling of the picture: the control that many methods have been found to lose to. Text unseen, nothing learned.

VTC-Bench (Liao et al., ACL 2026, arXiv:2510.07143; Chenfei-Liao/VTC-Bench 55936d4) gives Qwen2-VL, whose tower takes
any size, a smaller picture, by default of half the side, so that a quarter of the tokens is left. A CLIP tower was
trained for one size; the same is done here: what the processor made of the picture is downsampled (bicubic,
antialiased) to as many patches as tokens shall be left, and the tower sees it with position embeddings interpolated to
that grid. Upsampling it again would leave all tokens, and taking some of them would be another method.
A token stands at the place and position of the patch in the middle of what it covers. The tower's work shrinks too;
times show that, while FLOPs leave out the tower.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import Cut, ImageTokens
from dynamic_llava.methods.grid import CoarserGrid, middles, sides


@dataclass(frozen=True)
class Downsample(CoarserGrid):
    """Training-free: the vision tower sees a smaller picture; output tokens all stay."""

    name: ClassVar[str] = "downsample"
    training_free: ClassVar[bool] = True

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, picture_side=self.side_keep_rate),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: where the patches of the smaller picture stand."""
        kept = torch.tensor(middles(*sides(images.valid.shape[1], self.side_keep_rate)), device=images.valid.device)
        return torch.zeros_like(images.valid).index_fill(1, kept, True)
