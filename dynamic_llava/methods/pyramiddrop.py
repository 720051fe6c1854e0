"""PyramidDrop (Xing et al., CVPR 2025, arXiv:2410.17247): drop image tokens in stages, the deeper the more.

The published code cuts a language model of 32 layers at 8, 16 and 24, and at each cut keeps half of the image tokens
that are left, those that the last token of the question attends to most. Two things are ours: the row of attention is
that of the layer before the cut, where theirs is that of the layer behind it; and kept tokens keep their positions,
where theirs close up.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import BudgetKind, Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Training-free image selection at several layers, each by one attention row; output tokens all stay."""

    name: ClassVar[str] = "pyramiddrop"
    training_free: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    """The layers before which image tokens are dropped, ascending; None: at each quarter of the depth."""
    stage_keep_rate: float = 0.5
    """Share of an image's remaining tokens that each of these layers leaves."""

    def __post_init__(self) -> None:
        check_keep_rate("stage_keep_rate", self.stage_keep_rate)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # a list, from a YAML file
            if not self.layers:
                raise ValueError(
                    "layers=() drops nothing; give one layer or more, or None for each quarter of the depth"
                )

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The share that each cut leaves."""
        return ("stage_keep_rate",)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut before each of `layers`, or at each quarter of the depth that a shallow model has."""
        quarters = sorted({layers * quarter // 4 for quarter in (1, 2, 3)} - {0})
        places = self.layers if self.layers is not None else quarters
        return tuple(Cut(layer, frozenset({"question_row"})) for layer in places)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the highest-attended of each image's remaining tokens."""
        return top_k_keep(images.seen["question_row"], rate=self.stage_keep_rate, valid=images.valid)
