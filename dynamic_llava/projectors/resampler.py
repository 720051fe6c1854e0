"""Resampler: learned queries attend to all patches of an image, layer by layer, and become its tokens.

Bai et al., Qwen-VL, arXiv:2308.12966, as the baseline of Honeybee, Cha et al., arXiv:2312.06742; khanrc/honeybee
68a8d84, honeybee/projectors/resamplers.py and configs/model_config/resampler.yaml.
Six layers: queries and features are normalised, queries attend to both, and a perceptron follows, one half of which
weighs the other; what is added to is the normalised query, as in the published code. No places are added to the
features, as its configuration says. Widths of 1024 are the tower's here, heads are 64 wide where it is wide enough, and
there are as many queries as other projectors make tokens, 144 for LLaVA-1.5, which the comparison takes, where the
published default is 64. The published dropout of attention in training, 0.1, is left out: it would draw by batch and
process.
Shape suffixes: I images, P patches of one image, F feature size, n image tokens, D hidden size.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.projectors.base import BlockProjector, feature_width, grid_of, heads_of

LAYERS, HEAD_WIDTH = 6, 64


class Resampler(BlockProjector):
    """A learned query for each 2 x 2 patches, though every query sees them all."""

    name: ClassVar[str] = "resampler"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        width = config.vision_config.hidden_size
        self.entrance = nn.Linear(feature_width(config), width)
        self.queries = nn.Parameter(torch.empty(self.tokens(grid_of(config)), width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(LAYERS))
        self.exit = nn.Linear(width, config.text_config.hidden_size)
        self.initialise()

    def initialise(self) -> None:
        """Draw the queries, which would all stay the same if they were equal."""
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D)."""
        features = self.entrance(features_IPF)
        queries = self.queries.to(features).repeat(len(features), 1, 1)
        for block in self.blocks:
            queries = block(queries, features)
        tokens_InD: Tensor = self.exit(queries)
        return tokens_InD


class _Block(nn.Module):
    """Queries attend to themselves and to the features; a perceptron that weighs one half by the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.split = (heads_of(width, HEAD_WIDTH), -1)
        self.query_norm, self.key_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.weighing, self.up = (nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.Linear(4 * width, width)
        self.inner_norm = nn.LayerNorm(4 * width, eps=1e-6)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = self.query_norm(queries)
        queries = queries + self.out(self._attend(queries, torch.cat([queries, self.key_norm(features)], dim=1)))
        inner = self.mlp_norm(queries)
        changed: Tensor = queries + self.down(self.inner_norm(F.silu(self.weighing(inner)) * self.up(inner)))
        return changed

    def _attend(self, queries: Tensor, seen: Tensor) -> Tensor:
        """What queries (I, n, width) take of what they see, (I, n + P, width)."""
        of_heads = (self.query(queries), self.key(seen), self.value(seen))
        query, key, value = (one.unflatten(-1, self.split).transpose(1, 2) for one in of_heads)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        taken: Tensor = scores.softmax(-1) @ value
        return taken.transpose(1, 2).flatten(2)
