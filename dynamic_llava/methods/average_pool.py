"""Average pooling: the control that every choice of patches must beat. Text unseen, nothing learned.

An image's patches lie in a square grid; a coarser one is laid over it, and each of its cells becomes one token, made by
the projector from the mean of the cell's patches, as DeCo pools (arXiv:2405.20985, which trains for it). Half of the
side, a quarter of the tokens, by default; where the coarser side does not divide the side, cells are those of adaptive
pooling. A token stands at the place and position of the patch in the middle of its cell.
Shape suffixes: I images, n image tokens, m image tokens left, one for each cell.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dynamic_llava.methods.base import Choice, Cut, ImageTokens
from dynamic_llava.methods.grid import CoarserGrid, middles, sides, spans


@dataclass(frozen=True)
class AveragePool(CoarserGrid):
    """Training-free: each cell of a coarser grid becomes the mean of its patches; output tokens all stay."""

    name: ClassVar[str] = "average_pool"
    training_free: ClassVar[bool] = True

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the projector."""
        return (Cut(0, before_projector=True),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Choice:
        """The middles of the cells, and the shares that their patches have in them."""
        count, patches = images.valid.shape
        side, coarse = sides(patches, self.side_keep_rate)
        along_mn = torch.zeros(coarse, side, device=images.valid.device)
        for cell, (first, behind) in enumerate(spans(side, coarse)):
            along_mn[cell, first:behind] = 1 / (behind - first)
        kept_m = torch.tensor(middles(side, coarse), device=along_mn.device)
        shares_nn = torch.zeros(patches, patches, device=along_mn.device)
        shares_nn[kept_m] = torch.kron(along_mn, along_mn)
        keep_In = torch.zeros_like(images.valid).index_fill(1, kept_m, True)
        return Choice(keep_In, shares=shares_nn.expand(count, -1, -1))
