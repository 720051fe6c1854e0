"""A toy of the kind two cuts: half of an image's tokens go at one layer, half of the others at a later one."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods import Cut, ImageTokens, Method


@dataclass(frozen=True)
class Stairs(Method):
    """Keep every other token of what is left of an image, at each of two layers."""

    name: ClassVar[str] = "stairs"
    training_free: ClassVar[bool] = True

    first: int = 1
    """The first layer that sees half of the image tokens."""
    second: int = 3
    """The first layer that sees a quarter."""

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """Two cuts, which see hidden states alone."""
        return (Cut(self.first), Cut(self.second))

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the tokens 0, 2, 4, ... of those that are left."""
        place_n = torch.arange(images.valid.shape[1], device=images.valid.device)
        return (place_n % 2 == 0).expand_as(images.valid)
