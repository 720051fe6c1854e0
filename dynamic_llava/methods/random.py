"""Random dropping, the baseline every learned selection must beat.

Draws depend on (seed, sample key, place of the token) alone: the same in any batch and on every path. Of outputs, the
first of each answer and the last may stay besides: with `output_keep_rate=0` that is StreamingLLM's rule (Xiao et al.,
2023, arXiv:2309.17453) over the tokens of answers alone, in the layers where learned admission drops them too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import Cut, ImageTokens, OneCut, OutputTokens, check_rate_or_none, keep_all_image
from dynamic_llava.methods.eviction import check_count
from dynamic_llava.sparsity.decisions import top_k_keep
from dynamic_llava.sparsity.noise import fold_key, uniform_noise


@dataclass(frozen=True)
class Random(OneCut):
    """Keep a random set of floor(rate * n) tokens of each image, and each output token with probability rate."""

    name: ClassVar[str] = "random"
    training_free: ClassVar[bool] = True

    image_keep_rate: float | None = 0.2
    """Share of each image's tokens that stays; None keeps all, 0 drops all."""
    output_keep_rate: float | None = 0.5
    """Probability with which an output token stays; None keeps all."""
    seed: int = 0
    """Seed of the draws."""
    output_window: int = 0
    """A dropped output token is still seen in so many next steps."""
    output_sinks: int = 0
    """The first so many tokens of each answer stay."""

    def __post_init__(self) -> None:
        check_count("output_window", self.output_window, "number of steps")
        check_count("output_sinks", self.output_sinks, "number of tokens")
        check_rate_or_none("image_keep_rate", self.image_keep_rate)
        check_rate_or_none("output_keep_rate", self.output_keep_rate)

    @property
    def drop_delay(self) -> int:
        """The window, where output tokens are dropped."""
        return 0 if self.output_keep_rate is None else self.output_window

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool, floor(rate * n) True in each row (at least one unless the rate is 0)."""
        keep_In = keep_all_image(images)
        if self.image_keep_rate is None:
            return keep_In
        if self.image_keep_rate == 0:
            return ~keep_In
        place_n = torch.arange(keep_In.shape[1], device=keep_In.device)
        draw_In = uniform_noise(fold_key(self.seed, images.key), place_n)
        return top_k_keep(draw_In, rate=self.image_keep_rate, valid=images.valid)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool, independent draws, True at sinks."""
        if self.output_keep_rate is None:
            return super().keep_output(outputs, learned)
        draw_T1 = uniform_noise(fold_key(self.seed, outputs.key), outputs.rank[:, None], stream=1)
        return (draw_T1[:, 0] < self.output_keep_rate) | (outputs.place < self.output_sinks)
