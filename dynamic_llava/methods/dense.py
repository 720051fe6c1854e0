"""LLaVA-1.5 as it is: every token stays."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dynamic_llava.methods.base import (
    ImageTokens,
    Method,
    OutputTokens,
    Predictors,
    keep_all_image,
    keep_all_output,
)


@dataclass(frozen=True)
class Dense(Method):
    """Keep everything; the decoder then runs exactly as transformers' own."""

    name: ClassVar[str] = "dense"
    training_free: ClassVar[bool] = True

    @property
    def is_dense(self) -> bool:
        """Always True."""
        return True

    def keep_image(self, images: ImageTokens, predictors: Predictors) -> Tensor:
        """(I, n) bool, all True."""
        return keep_all_image(images)

    def keep_output(self, outputs: OutputTokens, predictors: Predictors) -> Tensor:
        """(T,) bool, all True."""
        return keep_all_output(outputs)
