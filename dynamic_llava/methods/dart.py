"""DART (Wen et al., EMNLP 2025, arXiv:2502.11494): image tokens that are least like a few pivots.

At one layer, text seen. Pivots are the image tokens and the tokens of the question whose keys in the layer before have
the largest L1 norm, four of each by default. Image pivots stay. Each pivot in turn then takes the image tokens that are
least like it, by the cosine of hidden states under the norm behind the last layer, of those that nobody has taken.
Source: as in ModelTC/llmc 05eedff, llmc/compression/token_reduction/dart.py. Ours: the budget is a share, rounded down,
and exact, dealt out as evenly as whole tokens allow, where theirs gives every pivot as many beside the image pivots and
so misses it by some; the order is fixed, image pivots before those of the question, each by falling norm, where theirs
is that of a Python set, by which what the last pivots find is left to chance; ties go to the earlier token; the
question is an image's own, what the row says behind it and before its first answer.
Shape suffixes: I images, n image tokens, m image tokens left that are pivots, t question tokens, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, OneCut
from dynamic_llava.methods.evidence import Evidence
from dynamic_llava.sparsity.decisions import budgets, top_k_keep


@dataclass(frozen=True)
class DART(OneCut):
    """Training-free: image tokens by how little they are like pivots; output tokens all stay."""

    name: ClassVar[str] = "dart"
    sees: ClassVar[frozenset[Evidence]] = frozenset({"keys", "normed"})
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    image_pivots: int = 4
    """Image tokens that are pivots."""
    text_pivots: int = 4
    """Tokens of the question that are pivots; fewer where it is shorter."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        for name in ("image_pivots", "text_pivots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} is no number of pivots; give an int of 0 or more")
        if not self.image_pivots + self.text_pivots:
            raise ValueError("image_pivots=0 and text_pivots=0 leave nothing to compare with; give 1 or more of either")

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the image pivots, and what every pivot takes."""
        assert images.question is not None
        total_I = budgets(self.image_keep_rate, images.valid.sum(1))
        image_Im, first_Im = strongest(images.seen["keys"], images.valid, self.image_pivots)
        first_Im = first_Im & (torch.arange(first_Im.shape[1], device=total_I.device) < total_I[:, None])
        text, asked = strongest(images.question.seen["keys"], images.question.valid, self.text_pivots)
        hidden_InD, text_ItD = (F.normalize(of.seen["normed"].float(), dim=-1) for of in (images, images.question))
        pivots = torch.cat([chosen(hidden_InD, image_Im), chosen(text_ItD, text)], dim=1)
        is_pivot = torch.cat([first_Im, asked], dim=1)
        taken_In = torch.zeros_like(images.valid).scatter(1, image_Im, first_Im)
        shares = dealt_out(total_I - first_Im.sum(1), is_pivot)
        for pivot_ID, share_I in zip(pivots.unbind(1), shares.unbind(1), strict=True):
            unlike_In = -(hidden_InD @ pivot_ID[..., None])[..., 0]
            taken_In = taken_In | top_k_keep(unlike_In, share_I, valid=images.valid & ~taken_In)
        return taken_In


def strongest(keys_InD: Tensor, valid_In: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the tokens whose keys have the largest L1 norm, by falling norm.

    (I, m) int64 and bool: their places, and whether there are so many; m is `count`, or the tokens of the longest where
    it has fewer.
    """
    norm_In = keys_InD.float().abs().sum(-1).masked_fill(~valid_In, -torch.inf)
    order_Im = norm_In.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return order_Im, valid_In.gather(1, order_Im)


def chosen(hidden_InD: Tensor, place_Im: Tensor) -> Tensor:
    """(I, m, D): the tokens at places (I, m) int64."""
    return hidden_InD.gather(1, place_Im[..., None].expand(-1, -1, hidden_InD.shape[2]))


def dealt_out(total_I: Tensor, among: Tensor) -> Tensor:
    """(I, pivots) int64: `total_I` (I,) int64 tokens, as evenly as can be, to those where `among` is True."""
    place, count = among.cumsum(1), among.sum(1, keepdim=True).clamp(min=1)
    up = total_I[:, None] * place // count
    return torch.where(among, up - total_I[:, None] * (place - 1) // count, 0)
