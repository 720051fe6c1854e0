"""TokenPacker: each block of patches becomes one token, a coarse query that attends to the block's fine features.

Li et al., "TokenPacker: Efficient Visual Projector for Multimodal LLM", arXiv:2407.02392; CircleRadon/TokenPacker
c38f140 and 771a16e, llava/model/multimodal_projector/builder.py and multimodal_encoder/clip_encoder.py.
Queries are made of one layer, shrunk bilinearly by s; keys and values of several layers side by side, each through a
perceptron of its own; all three are normalised, a query sees the s x s patches of its own block alone, and a perceptron
makes the token. As in the released code, and unlike the paper's figure, nothing is added to what the attention gives.
Widths of 1024 are the tower's here, and heads are 128 wide where it is wide enough; the layers 12, 16, 22 and 23 of 24
are a half, two thirds and the last two but one of any tower. For LLaVA-1.5's tower all of that is as published.
Shape suffixes: I images, P patches of one image, F feature size, n image tokens, D hidden size.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.projectors.base import BlockProjector, Layers, as_blocks, as_map, feature_width, heads_of

HEAD_WIDTH = 128


class TokenPacker(BlockProjector):
    """144 tokens of LLaVA-1.5's 576 patches, each of 2 x 2 of them."""

    name: ClassVar[str] = "tokenpacker"

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        self.width: int = config.vision_config.hidden_size
        self.heads = heads_of(self.width, HEAD_WIDTH)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key, self.value = (_perceptron(feature_width(config), self.width) for _ in range(2))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(self.width, eps=1e-6) for _ in range(3))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * self.width, self.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * self.width))
        self.out_proj = nn.Linear(self.width, self.width)
        self.mlp = _perceptron(self.width, config.text_config.hidden_size)
        self.initialise()

    @classmethod
    def layers(cls, chosen: Layers, depth: int) -> Layers:
        """Return four layers for the usual one, the last of them that one; several are taken as they are."""
        if not isinstance(chosen, int):
            return chosen
        if chosen % (depth + 1) != depth - 1:
            raise ValueError(
                f"vision_feature_layer={chosen} names one layer of the vision tower, and projector {cls.name!r} reads "
                "several; give a list, whose last one makes the queries, or leave it at -2 for the published ones"
            )
        return [depth // 2, 2 * depth // 3, max(0, depth - 2), depth - 1]

    def initialise(self) -> None:
        """Set truncated normal weights, as published; those of the attention's entrance are nn.MultiheadAttention's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D); the last layer of several makes the queries."""
        fine = as_map(features_IPF[..., -self.width :])
        coarse = F.interpolate(fine.float(), size=[side // self.scale for side in fine.shape[2:]], mode="bilinear")
        coarse = coarse.flatten(2).transpose(1, 2).to(features_IPF)
        query = self.query_norm(self.query(coarse))[:, :, None]
        key = as_blocks(self.key_norm(self.key(features_IPF)), self.scale)
        value = as_blocks(self.value_norm(self.value(features_IPF)), self.scale)
        tokens_InD: Tensor = self.mlp(self.out_proj(self._attend(query, key, value)))
        return tokens_InD

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(I, n, width): what the query of each block, (I, n, 1, width), takes of the block's patches."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        split = (self.heads, self.width // self.heads)
        query, key, value = (F.linear(*one).unflatten(-1, split).transpose(2, 3) for one in given)
        scores = query @ key.transpose(-1, -2) * split[1] ** -0.5
        taken: Tensor = scores.softmax(-1) @ value
        return taken.flatten(2)


class TokenPacker3(TokenPacker):
    """64 tokens of LLaVA-1.5's 576 patches."""

    name: ClassVar[str] = "tokenpacker_3"
    scale: ClassVar[int] = 3


class TokenPacker4(TokenPacker):
    """36 tokens of LLaVA-1.5's 576 patches."""

    name: ClassVar[str] = "tokenpacker_4"
    scale: ClassVar[int] = 4


def _perceptron(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
