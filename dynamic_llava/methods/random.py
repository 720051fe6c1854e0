"""Random dropping, the baseline every learned selection must beat.

Draws depend on (seed, sample key, place of the token) alone: the same in any batch and on every path.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import (
    ImageTokens,
    Method,
    OutputTokens,
    Predictors,
    check_rate_or_none,
    keep_all_image,
    keep_all_output,
)
from dynamic_llava.sparsity.decisions import budget, top_k_keep
from dynamic_llava.sparsity.noise import fold_key, uniform_noise


@dataclass(frozen=True)
class Random(Method):
    """Keep a random set of floor(rate * n) tokens of each image, and each output token with probability rate."""

    name: ClassVar[str] = "random"
    training_free: ClassVar[bool] = True

    image_keep_rate: float | None = 0.2
    """Share of each image's tokens that stays; None keeps all, 0 drops all."""
    output_keep_rate: float | None = 0.5
    """Probability with which an output token stays; None keeps all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_rate_or_none("image_keep_rate", self.image_keep_rate)
        check_rate_or_none("output_keep_rate", self.output_keep_rate)

    def keep_image(self, images: ImageTokens, predictors: Predictors) -> Tensor:
        """(I, n) bool, floor(rate * n) True in each row (at least one unless the rate is 0)."""
        keep_In = keep_all_image(images)
        if self.image_keep_rate is None:
            return keep_In
        if self.image_keep_rate == 0:
            return ~keep_In
        count = keep_In.shape[1]
        place_n = torch.arange(count, device=keep_In.device)
        return top_k_keep(uniform_noise(fold_key(self.seed, images.key), place_n), budget(self.image_keep_rate, count))

    def keep_output(self, outputs: OutputTokens, predictors: Predictors) -> Tensor:
        """(T,) bool, independent draws."""
        if self.output_keep_rate is None:
            return keep_all_output(outputs)
        draw_T1 = uniform_noise(fold_key(self.seed, outputs.key), outputs.rank[:, None], stream=1)
        return draw_T1[:, 0] < self.output_keep_rate
