"""A toy of the kind learned: a linear scorer of image tokens with a loss of its own, all of the method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynamic_llava.config import SparsityConfig, check_keep_rate
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Cut, Draw, ImageTokens, OneCut
from dynamic_llava.methods.base import Record
from dynamic_llava.sparsity.decisions import top_k_keep


class Scorer(nn.Module):
    """One logit per token, with a learned scale, which is a parameter that no layer of torch owns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.full((1,), 4.0))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32."""
        return (self.linear(self.norm(hidden))[..., 0] * self.scale).float()


@dataclass(frozen=True)
class Linear(OneCut):
    """Training keeps where the logit is positive, with the gradient of its sigmoid; inference keeps the best share."""

    name: ClassVar[str] = "linear"

    image_keep_rate: float = 0.25
    """Share of each image's tokens that stays."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def build(self, width: int, settings: SparsityConfig) -> nn.Module:
        """The scorer."""
        return Scorer(width)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the highest logits of each image."""
        return top_k_keep(learned(images.hidden), rate=self.image_keep_rate, valid=images.valid)

    def sample(self, cut: Cut, images: ImageTokens, learned: Any, draw: Draw) -> Tensor:
        """(I, n) float: the sign of the logit, with the gradient of its sigmoid."""
        logit_In = learned(images.hidden)
        soft_In = torch.sigmoid(logit_In / draw.tau)
        return (logit_In > 0).float() + soft_In - soft_In.detach()

    def loss_samples(self, layout: TokenLayout, decided: Tensor, settings: SparsityConfig) -> dict[str, Tensor]:
        """A mean over the samples with an image."""
        return {"share_loss": layout.is_image.any(1)}

    def losses(self, record: Record, counts: Mapping[str, Tensor], settings: SparsityConfig) -> dict[str, Tensor]:
        """How far the share of each sample's image tokens is from its target, in absolute value."""
        image_BN = record.layout.is_image
        share_B = (record.keep_mask * image_BN).sum(1) / image_BN.sum(1).clamp(min=1)
        gap_B = (share_B - self.image_keep_rate).abs() * image_BN.any(1)
        return {"share_loss": gap_B.sum() / counts["share_loss"]}

    def keep_rates(self, settings: SparsityConfig) -> dict[str, float]:
        """The share of image tokens."""
        return {"image_keep_rate": self.image_keep_rate}
