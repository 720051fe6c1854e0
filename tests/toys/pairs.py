"""A toy of the kind merging: each two neighbours of an image become one token, before the language model."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dynamic_llava.methods import Choice, Cut, ImageTokens, Method


@dataclass(frozen=True)
class Pairs(Method):
    """Merge token 2 i + 1 into token 2 i, which becomes the sum of both by their weights."""

    name: ClassVar[str] = "pairs"
    training_free: ClassVar[bool] = True

    share: float = 0.75
    """Weight of the token that stays; its neighbour has the rest of 1."""

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Choice:
        """Even tokens stay, odd ones go into the token before them; a last one without a neighbour counts in full."""
        place_n = torch.arange(images.valid.shape[1], device=images.valid.device)
        even_In = (place_n % 2 == 0).expand_as(images.valid)
        single_In = even_In & (place_n == images.valid.sum(1, keepdim=True) - 1)
        weight_In = torch.where(even_In, self.share, 1 - self.share).masked_fill(single_In, 1.0)
        return Choice(keep=even_In, into=(place_n - place_n % 2).expand_as(images.valid), weight=weight_In)
