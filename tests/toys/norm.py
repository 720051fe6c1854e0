"""A toy of the kind prefill cut: image tokens by the norm of their hidden state; output tokens all stay."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods import Cut, ImageTokens, OneCut
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class Norm(OneCut):
    """Keep the largest norms of each image."""

    name: ClassVar[str] = "norm"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.3
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the largest norms of each image."""
        return top_k_keep(images.hidden.norm(dim=-1), rate=self.image_keep_rate, valid=images.valid)
