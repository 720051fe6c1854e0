"""What methods share that keep as many image tokens as stand out: how many those are, and the share in their place.

Shape suffixes: I images, n image tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import BudgetKind, Method


@dataclass(frozen=True)
class OutlierRate(Method):
    """Each image says itself how many tokens it needs, or all keep the same share; one of them is made of the rest."""

    image_keep_rate: float | Literal["outliers"] = "outliers"
    """Share of each image's tokens that stays, the one made of the rest among them; or what its outliers ask for."""

    def __post_init__(self) -> None:
        if isinstance(self.image_keep_rate, str) and self.image_keep_rate != "outliers":
            raise ValueError(f"image_keep_rate={self.image_keep_rate!r}; give a number in (0, 1], or 'outliers'")
        if not isinstance(self.image_keep_rate, str):
            check_keep_rate("image_keep_rate", self.image_keep_rate)

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The share, whether it is one already or the rule."""
        return ("image_keep_rate",)


def outliers(score_In: Tensor) -> Tensor:
    """(I,) int64: how many scores of each image are above its third quartile by more than 1.5 times their distance."""
    lower_I1, upper_I1 = score_In.quantile(torch.tensor([0.25, 0.75]).to(score_In), dim=1, keepdim=True)
    return (score_In > upper_I1 + 1.5 * (upper_I1 - lower_I1)).sum(1)
