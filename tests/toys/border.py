"""A toy of the kind vision stage: of each image the first and the last tokens stay, before the language model."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.methods import Cut, ImageTokens, Method


@dataclass(frozen=True)
class Border(Method):
    """Keep `edge` tokens at either end of an image."""

    name: ClassVar[str] = "border"
    training_free: ClassVar[bool] = True

    edge: int = 2
    """Tokens that stay at either end."""

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: tokens nearer than `edge` to an end of their image."""
        place_n = torch.arange(images.valid.shape[1], device=images.valid.device)
        last_I1 = images.valid.sum(1, keepdim=True) - 1
        return (place_n < self.edge) | (last_I1 - place_n < self.edge)
