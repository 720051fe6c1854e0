"""VoCo-LLaMA: learned tokens behind an image read it in every layer, and what follows reads them instead of it.

arXiv:2406.12275; github.com/Yxxxb/VoCo-LLaMA at 3b6e14d. So many equal tokens, one learned embedding, stand behind an
image. The whole model is trained under a mask by which text does not see the image, so that what an answer needs of it
gathers in the keys and values of these tokens, which alone are stored. The image is not spared: it passes every layer
once, with the added tokens behind it. The figures that are published as the method's cost, 2.2 TFLOP for 128 tokens,
are those of a cache that is used again.

The paper hides images from text. The published code hides whatever stands before the first added token, by position;
its prompts begin with the image, and the system text follows, so that this is the image, a line break and the begin
token. Deviations: here a prompt is LLaVA's, the system text before the image, and images alone are hidden, as the paper
says; so each of several images is, where the published mask would show all but the first. The added tokens follow
an image at once, where the published prompt has a line break on either side of them, and are no words: the embedding is
the method's own, and the vocabulary stays as it was. Positions are those of the whole sequence, as published.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import PartCosts
from dynamic_llava.methods.base import Cut, Draw, ImageTokens, Method

MOST = 4096
"""More would be no compression; and a checkpoint says the number, from which prompts are made."""
SPREAD = 0.02
"""Standard deviation of the embedding before training: that of a new word of Vicuna's."""


class AddedTokens(nn.Module):
    """One learned embedding, as often as it is asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, width) * SPREAD)

    def forward(self, count: int) -> Tensor:
        """Return (count, D)."""
        return self.token.repeat(count, 1)


@dataclass(frozen=True)
class VoCoLlama(Method):
    """Of each image the added tokens alone are stored; output tokens all stay."""

    name: ClassVar[str] = "voco_llama"

    tokens: int = 128
    """Added tokens of each image, the same in training and afterwards."""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not 1 <= self.tokens <= MOST:
            raise ValueError(f"tokens={self.tokens!r} is no number of tokens to add to an image; give 1 to {MOST}")

    @property
    def added_tokens(self) -> int:
        """That many."""
        return self.tokens

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, from the first layer on; added tokens still read their image behind it."""
        return (Cut(0, within_image=True),)

    def build(self, width: int, settings: SparsityConfig) -> nn.Module:
        """The embedding."""
        return AddedTokens(width)

    def costs(self, width: int, settings: SparsityConfig) -> dict[str, PartCosts]:
        """The embedding judges nothing."""
        return {"method": PartCosts(parameters=width, flops=0)}

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the added tokens, which are each image's last."""
        place_n = torch.arange(images.valid.shape[1], device=images.valid.device)
        return place_n >= images.valid.sum(1, keepdim=True) - self.tokens

    def sample(self, cut: Cut, images: ImageTokens, learned: Any, draw: Draw) -> Tensor:
        """(I, n) bool: the same; the embedding has its gradient from what reads it."""
        return self.keep_image(cut, images, learned)
