"""FastV (Chen et al., 2024, arXiv:2403.06764): keep the image tokens that the question's last token attends to most.

The published code ranks by the head-mean attention of the LAST prompt token in the layer before the sparse one, and
keeps positions; this does the same from one recomputed attention row, so that no layer needs eager attention. In the
original comparison of the paper: layer 3, keep rate 0.25. Its trained row is the same rule in training, where dropped
tokens are zero vectors (configs/ablations/table1_fastv_trained.yaml); FastV+H2O is spelled in mixed.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, OneCut
from dynamic_llava.methods.evidence import Evidence
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class FastV(OneCut):
    """Training-free image selection by one attention row; output tokens all stay."""

    name: ClassVar[str] = "fastv"
    sees: ClassVar[frozenset[Evidence]] = frozenset({"question_row"})
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.5
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the highest-attended tokens of each image."""
        return top_k_keep(images.seen["question_row"], rate=self.image_keep_rate, valid=images.valid)
