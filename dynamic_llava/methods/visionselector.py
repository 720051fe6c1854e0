"""VisionSelector: a learned scorer of projected features, trained in front of a model that stays as it is.

arXiv:2510.16598; github.com/JulietChoo/VisionSelector at 1832032 (its training script; the code of the pass was read in
copies of that repository). A token's score is the mean, over the tokens of its image, of the product of its query with
their keys, divided by the square root of the width: two linear maps, 1792 wide, that begin with a deviation of 1e-4 and
no bias. The best share stays, 20 %, which is decided before the language model; a kept token keeps its position.

The published training multiplies each projected feature by its membership in a soft top-k, sigmoid(score + t) with the
t at which they sum to the budget, and draws memberships to the hard choice by a cross entropy whose weight grows from
0.1 to 3 (2 in the newest script). Deviations: here training hides what inference drops, and what has that soft top-k's
gradient is the hard choice itself (`sparsity.training.soft_topk` at temperature 1), so nothing is left for the cross
entropy to close; scores are those of each image by itself, where the published ones are those of all images of a batch.
Shape suffixes: I images, n image tokens of the longest, D hidden size, d head size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.config import SparsityConfig, check_keep_rate
from dynamic_llava.methods.base import Cut, Draw, ImageTokens, Method
from dynamic_llava.sparsity.decisions import top_k_keep
from dynamic_llava.sparsity.training import soft_topk

SCORE_WIDTH = 1792
"""Width of queries and keys."""
SPREAD = 1e-4
"""Standard deviation of the weights before training."""


class ImportanceScorer(nn.Module):
    """Queries and keys of tokens; the weights are the module's own, so that nothing else says how they begin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(SCORE_WIDTH, width) * SPREAD) for _ in range(2))
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(SCORE_WIDTH)) for _ in range(2))

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(I, n, D), and (I, n) bool, the tokens of each image -> (I, n) float32; scores at filler mean nothing."""
        query_Ind = F.linear(hidden, self.query.to(hidden.dtype), self.query_bias.to(hidden.dtype)).float()
        key_Ind = F.linear(hidden, self.key.to(hidden.dtype), self.key_bias.to(hidden.dtype)).float()
        # The mean of the products is the product with the mean.
        count_I1 = valid.sum(1, keepdim=True).clamp(min=1)
        mean_I1d = (key_Ind * valid[..., None]).sum(1, keepdim=True) / count_I1[..., None]
        return (query_Ind * mean_I1d).sum(-1) / SCORE_WIDTH**0.5


@dataclass(frozen=True)
class VisionSelector(Method):
    """Image tokens by learned scores; output tokens all stay."""

    name: ClassVar[str] = "visionselector"

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays, in training too; the published ones train at this and run at any."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0),)

    def build(self, width: int, settings: SparsityConfig) -> nn.Module:
        """The scorer."""
        return ImportanceScorer(width)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the highest scores of each image."""
        return top_k_keep(learned(images.hidden, images.valid), rate=self.image_keep_rate, valid=images.valid)

    def sample(self, cut: Cut, images: ImageTokens, learned: Any, draw: Draw) -> Tensor:
        """(I, n) float: the same choice, with the gradient of the soft top-k."""
        score_In = learned(images.hidden, images.valid)
        logits_In2 = torch.stack([torch.zeros_like(score_In), score_In], dim=-1)
        return soft_topk(logits_In2, torch.zeros_like(logits_In2), 1.0, self.image_keep_rate, images.valid)
