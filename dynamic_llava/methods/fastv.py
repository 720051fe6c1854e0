"""FastV (Chen et al., 2024, arXiv:2403.06764): keep the image tokens that the question's last token attends to most.

The published code ranks by the head-mean attention of the LAST prompt token in the layer before the sparse one, and
keeps positions; this does the same from one recomputed attention row, so that no layer needs eager attention. In the
original comparison of the paper: layer 3, keep rate 0.25.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import ImageTokens, Method, OutputTokens, Predictors, keep_all_output
from dynamic_llava.sparsity.decisions import budget, top_k_keep


@dataclass(frozen=True)
class FastV(Method):
    """Training-free image selection by one attention row; output tokens all stay."""

    name: ClassVar[str] = "fastv"
    needs_attention: ClassVar[bool] = True
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.5
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def keep_image(self, images: ImageTokens, predictors: Predictors) -> Tensor:
        """(I, n) bool: the highest-attended tokens of each image."""
        if images.attention is None:
            raise ValueError("FastV needs an attention row; the engine provides it where `needs_attention` is True")
        return top_k_keep(images.attention, budget(self.image_keep_rate, images.attention.shape[1]))

    def keep_output(self, outputs: OutputTokens, predictors: Predictors) -> Tensor:
        """(T,) bool, all True."""
        return keep_all_output(outputs)
