"""Regular dropping: keep tokens at even distances; a rate of one half keeps every other token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods.base import Cut, ImageTokens, OneCut, OutputTokens, check_rate_or_none, keep_all_image
from dynamic_llava.sparsity.decisions import evenly_spaced


@dataclass(frozen=True)
class Structure(OneCut):
    """Keep token t where floor((t + 1) * rate) > floor(t * rate), counted within the image or the row's output."""

    name: ClassVar[str] = "structure"
    training_free: ClassVar[bool] = True

    image_keep_rate: float | None = 0.2
    """Share of each image's tokens that stays; None keeps all, 0 drops all."""
    output_keep_rate: float | None = 0.5
    """Share of the output tokens that stays; None keeps all."""

    def __post_init__(self) -> None:
        check_rate_or_none("image_keep_rate", self.image_keep_rate)
        check_rate_or_none("output_keep_rate", self.output_keep_rate)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool, the same for every image."""
        keep_In = keep_all_image(images)
        if self.image_keep_rate is None:
            return keep_In
        place_n = torch.arange(keep_In.shape[1], device=keep_In.device)
        return evenly_spaced(place_n, self.image_keep_rate).expand_as(keep_In)

    def keep_output(self, outputs: OutputTokens, learned: Any) -> Tensor:
        """(T,) bool from the token's rank alone."""
        if self.output_keep_rate is None:
            return super().keep_output(outputs, learned)
        return evenly_spaced(outputs.rank, self.output_keep_rate)
