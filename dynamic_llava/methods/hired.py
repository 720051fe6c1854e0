"""HiRED (Arif et al., AAAI 2025, arXiv:2408.10945): keep the patches that the vision tower's class token attends to.

Before the language model, text unseen, by the attention summed over heads in the layer whose features the projector
reads; in raster order. For an image of one view, as LLaVA-1.5 takes them, that is the whole method; sharing a budget
out among the parts of a high-resolution image is for models that cut images into parts.
Source: hasanar1f/HiRED 502d6dd, transformers' llava/modeling_llava.py as changed there. Ours: each image of a batch has
a budget of its own, where theirs reads the first row alone; kept patches keep their positions, where theirs close up.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class HiRED(Method):
    """Training-free choice of the patches that matter to the class token; output tokens all stay."""

    name: ClassVar[str] = "hired"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0, frozenset({"class_row"})),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the most attended patches of each image."""
        return top_k_keep(images.seen["class_row"], rate=self.image_keep_rate, valid=images.valid)
