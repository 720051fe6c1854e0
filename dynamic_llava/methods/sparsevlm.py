"""SparseVLM (Zhang et al., ICML 2025, arXiv:2410.04417) and SparseVLM+: drop image tokens that raters do not look at.

At three layers, text seen. Raters are those tokens of the question that matter more than their mean to the row's image
tokens as they enter the language model. At each cut the image tokens stay that the raters attend to most in the layer
before, the mean over heads and raters. Version 1 recycles: of the dropped tokens the best 30 % and one more are grouped
by density peaks, one group for each ten of them and one more, and the mean of a group stays beside the others. Version
2, SparseVLM+, recycles nothing; its attention is divided by what the rotations of the two positions alone would weigh
(queries and keys of ones), and only 14 of 32 heads count, those with the most of it from the raters to the image.
Source: Gumpest/SparseVLMs 26a5f48, llava/model/language_model/{modelling_sparse_llama,score,utils}.py. The published
budgets are schedules of 576 tokens. 192: 300, 200, 110 (version 2: 300, 200, 118), the defaults here; 128: 303, 110, 36
(238, 108, 60), rate 0.0626 (0.1042); 64: 66, 30, 17 (66, 34, 20), rate 0.0296 (0.0348). Ours: schedules are
proportions, so that each image has a budget of its own length, and one setting turns all of them; without recycling a
cut may drop nothing, where theirs always drops one; a group stands at the place of its densest token, where theirs
stand behind the kept ones, and nothing is added to densities to tell equal ones apart: the earlier counts as denser;
where no token matters more than the mean every one is a rater; kept tokens keep their positions. The layers are of a
model of 32; in others those at the same part of the depth.
Shape suffixes: I images, n image tokens, t question tokens, H query heads, D hidden size.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import BudgetKind, Choice, Cut, ImageTokens, Method
from dynamic_llava.methods.evidence import Evidence
from dynamic_llava.sparsity.decisions import budget, top_k_keep

LAYERS, DEPTH = (3, 7, 16), 32
"""Where the published code drops, behind layers 2, 6 and 15 of a model of 32."""


@dataclass(frozen=True)
class Ranking(Cut):
    """A cut that knows its place in the schedule."""

    stage: int = 0
    """Index in the schedule."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """Training-free: ranks by the attention of the question's raters, at three layers; dropped tokens are recycled."""

    name: ClassVar[str] = "sparsevlm"
    training_free: ClassVar[bool] = True
    sees: ClassVar[frozenset[Evidence]] = frozenset({"question_rows", "relevance"})
    """What its cuts see."""

    last_keep_rate: float = 0.191
    """Share of each image's tokens that the ranks of the last cut leave; what is recycled comes on top."""
    schedule: tuple[int, ...] = (300, 200, 110)
    """What the ranks of each cut leave in proportion to the last; never more than all."""
    drop_layers: tuple[int, ...] | None = None
    """The layers before which image tokens are dropped, ascending; None: 3, 7, 16 of 32."""

    def __post_init__(self) -> None:
        check_keep_rate("last_keep_rate", self.last_keep_rate)
        for name in ("schedule", "drop_layers"):  # a list, from a YAML file
            object.__setattr__(self, name, None if getattr(self, name) is None else tuple(getattr(self, name)))
        whole = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in self.schedule)
        if not self.schedule or not whole:
            raise ValueError(f"schedule={self.schedule!r} holds no counts; give an int of 1 or more for each cut")
        cuts = len(LAYERS if self.drop_layers is None else self.drop_layers)
        if cuts != len(self.schedule):
            raise ValueError(
                f"schedule={self.schedule!r} is for {len(self.schedule)} cuts and there are {cuts}; give "
                "`drop_layers` and `schedule` as many entries"
            )

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The share of the last cut, and with it those of all."""
        return ("last_keep_rate",)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut before each of `drop_layers`; in a shallow model the last of those that fall together."""
        scaled = [max(1, layer * layers // DEPTH) for layer in LAYERS]
        places = {layer: stage for stage, layer in enumerate(scaled if self.drop_layers is None else self.drop_layers)}
        return tuple(Ranking(layer, self.sees, stage=stage) for layer, stage in places.items())

    def budgets(self, cut: Cut, images: ImageTokens) -> Tensor:
        """(I,) int64: what the ranks leave of each image at a cut."""
        assert isinstance(cut, Ranking)
        share = Fraction(str(self.last_keep_rate)) * self.schedule[cut.stage] / self.schedule[-1]
        counts = [min(n, max(1, math.floor(share * n))) for n in images.tokens.tolist()]
        return torch.tensor(counts, dtype=torch.int64, device=images.valid.device)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """The best-rated of each image's remaining tokens, and the groups that the others are recycled into."""
        raters_It = raters(images)
        shown_Int = images.seen["question_rows"].mean(-1) * raters_It[:, None]
        rated_In = shown_Int.sum(-1) / raters_It.sum(1, keepdim=True)
        best_In = top_k_keep(rated_In, self.budgets(cut, images), valid=images.valid)
        keep_In, heirs, weights = best_In.clone(), [], []
        for number, dropped_n in enumerate(images.valid & ~best_In):
            first = int(best_In[number].to(torch.uint8).argmax())
            heir_n, weight_n = torch.full_like(dropped_n, first, dtype=torch.int64), best_In[number].float()
            if count := int(dropped_n.sum()):
                recycled_n = top_k_keep(rated_In[number], int(count * 0.3) + 1, valid=dropped_n)
                place = recycled_n.nonzero()[:, 0]
                heir = place[grouped(images.hidden[number, place].float(), len(place) // 10 + 1)]
                heir_n[place], keep_In[number, heir] = heir, True
                weight_n[place] = 1 / torch.bincount(heir, minlength=len(heir_n))[heir]
            heirs.append(heir_n)
            weights.append(weight_n)
        return Choice(keep_In, into=torch.stack(heirs), weight=torch.stack(weights))


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """Training-free, version 2: attention without what positions alone weigh, of some heads; nothing is recycled."""

    name: ClassVar[str] = "sparsevlm_plus"
    training_free: ClassVar[bool] = True
    sees: ClassVar[frozenset[Evidence]] = frozenset({"question_rows", "relevance", "rotation"})

    last_keep_rate: float = 0.2049
    """Share of each image's tokens that the last cut leaves."""
    schedule: tuple[int, ...] = (300, 200, 118)
    """What each cut leaves in proportion to the last; never more than all."""
    head_share: float = 0.4375
    """Share of the heads that count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep_rate("head_share", self.head_share)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: the best-rated of each image's remaining tokens."""
        assert images.question is not None
        asked_Int = images.valid[..., None] & raters(images)[:, None]
        weight_Int = ones(images.seen["rotation"]) @ ones(images.question.seen["rotation"]).transpose(1, 2)
        weight_Int = weight_Int / math.sqrt(images.seen["rotation"].shape[-1] / 2)
        plain_IntH = images.seen["question_rows"] / weight_Int[..., None]
        by_head_InH = plain_IntH.masked_fill(~asked_Int[..., None], 0.0).sum(2)
        heads = budget(self.head_share, by_head_InH.shape[-1])
        counted_IH = top_k_keep(by_head_InH.sum(1), heads)
        return top_k_keep((by_head_InH * counted_IH[:, None]).sum(-1), self.budgets(cut, images), valid=images.valid)


def raters(images: ImageTokens) -> Tensor:
    """(I, t) bool: the tokens of each question that matter more than their mean; all where none does."""
    assert images.question is not None
    valid_It, relevance_It = images.question.valid, images.question.seen["relevance"]
    mean_I1 = (relevance_It * valid_It).sum(1, keepdim=True) / valid_It.sum(1, keepdim=True)
    above_It = valid_It & (relevance_It > mean_I1)
    return torch.where(above_It.any(1, keepdim=True), above_It, valid_It)


def ones(rotation: Tensor) -> Tensor:
    """Return vectors of ones, turned: of cosines and sines (..., 2d) the sums and differences (..., d)."""
    cos, sin = rotation.float().chunk(2, dim=-1)
    half = torch.ones(cos.shape[-1] // 2, device=cos.device)
    return cos + sin * torch.cat([-half, half])


def grouped(features: Tensor, count: int) -> Tensor:
    """Group tokens (r, D) into `count` by density peaks; (r,) int64: the centre of each one's group.

    A token's density falls with its mean squared distance to the `count` nearest, itself among them; centres are those
    whose density times the distance to a denser token is largest, and each token goes to the nearest centre.
    """
    apart = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
    density = (-apart.sort(dim=1).values[:, :count].square().mean(1)).exp()
    order = density.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    to_denser = torch.where(rank[None] < rank[:, None], apart, apart.max()).amin(1)
    centres = (density * to_denser).sort(descending=True, stable=True).indices[:count]
    nearest = centres[apart[:, centres].argmin(1)]
    return nearest.scatter(0, centres, centres)
