"""Pixel-Shuffle: the features of a block of patches side by side, normalised, through one perceptron.

As in InternVL 1.5, Chen et al., arXiv:2404.16821, which halves both sides; written from its text. The order of a
block's patches, raster order here, is another numbering of the first map's inputs, no other projector.
Shape suffixes: I images, P patches of one image, F feature size, n image tokens, D hidden size.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from dynamic_llava.projectors.base import BlockProjector, as_blocks, feature_width


class PixelShuffle(BlockProjector):
    """One token of four times the features for each 2 x 2 patches."""

    name: ClassVar[str] = "pixel_shuffle"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        width, hidden = self.scale**2 * feature_width(config), config.text_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D)."""
        tokens_InD: Tensor = self.mlp(self.norm(as_blocks(features_IPF, self.scale).flatten(2)))
        return tokens_InD
