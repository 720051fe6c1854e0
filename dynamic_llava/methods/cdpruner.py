"""CDPruner (Zhang et al., NeurIPS 2025, arXiv:2506.10967): diverse tokens, conditioned on the question.

Before the language model: of a determinantal point process whose kernel is r_i cos(x_i, x_j) r_j the likeliest set of
tokens is looked for greedily, each next one adding most to the determinant. x are projected features. The relevance r
is minus the mean cosine of a patch and the question's text in CLIP's shared space, over the text's pieces, stretched
over each image to begin just above 0 and end just above 1: the patches least like the question count most, as
published.
Source: Theia-4869/CDPruner 9541616, llava/model/llava_arch.py, clip_encoder.py. Ours: relevance is stretched over each
image and asked of its own question, where theirs takes least, most and mean over the whole batch; a long text is cut
into pieces with a start and an end each; the determinant is carried on of cosines alone, with relevance as a factor,
and a token that the chosen ones span already, its rest within rounding of 0, adds nothing, where theirs divides by what
is left of it; an image whose patches are all as relevant has a relevance of 1; budgets are a share, rounded down; the
question is the text behind the image, decoded from its ids; kept tokens keep their positions, where theirs close up;
ties go to the earlier token.
Shape suffixes: I images, n image tokens, m image tokens left, p pieces of the longest text, D hidden size, s size of
CLIP's shared space.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Cut, ImageTokens, Method
from dynamic_llava.methods.evidence import QuestionTokens
from dynamic_llava.sparsity.decisions import budget

LEAST = 1e-6
"""Least relevance, as published, and the rest of a token below which it counts as spanned by the chosen ones."""


@dataclass(frozen=True)
class CDPruner(Method):
    """Training-free: a determinantal point process over tokens, weighed by the question; output tokens all stay."""

    name: ClassVar[str] = "cdpruner"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.2
    """Share of each image's tokens that stays."""
    text_tower: str = "openai/clip-vit-large-patch14-336"
    """Folder or hub name of the whole CLIP model that the vision tower was taken from."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model, by CLIP."""
        return (Cut(0, frozenset({"clip_tokens", "clip_text"}), text_tower=self.text_tower),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool: floor(rate * n) tokens of each image."""
        assert images.question is not None
        relevance_In = relevance(images.seen["clip_tokens"], images.question)
        return likeliest(images.hidden, relevance_In, budget(self.image_keep_rate, images.hidden.shape[1]))


def relevance(tokens_Ins: Tensor, question: QuestionTokens) -> Tensor:
    """(I, n) float32: how little each patch is like the question's pieces, stretched over each image."""
    text_Ips = F.normalize(question.seen["clip_text"].float(), dim=-1)
    alike_Inp = F.normalize(tokens_Ins.float(), dim=-1) @ text_Ips.transpose(1, 2)
    sums_In = (alike_Inp * question.valid[:, None]).sum(-1)
    unlike_In = -sums_In / question.valid.sum(1, keepdim=True)
    least_I1, most_I1 = unlike_In.amin(1, keepdim=True), unlike_In.amax(1, keepdim=True)
    span_I1 = most_I1 - least_I1
    stretched_In = (unlike_In - least_I1 + LEAST) / span_I1
    return torch.where(span_I1 > 0, stretched_In, 1.0)


def likeliest(features_InD: Tensor, relevance_In: Tensor, count: int) -> Tensor:
    """(I, n) bool: so many tokens of each image, each the one that adds most to the determinant of the kernel.

    The kernel's determinant is that of the cosines times the squares of the relevances, so what a token adds is its
    squared relevance times its rest: the squared part of it that the chosen ones do not span (Cholesky, row by row).
    """
    unit_InD = F.normalize(features_InD.detach().float(), dim=-1)
    alike_Inn = unit_InD @ unit_InD.transpose(1, 2)
    images, patches = relevance_In.shape
    rows_Imn = alike_Inn.new_zeros(images, count, patches)
    rest_In = alike_Inn.diagonal(dim1=1, dim2=2).clone()
    keep_In = torch.zeros_like(relevance_In, dtype=torch.bool)
    for step in range(count):
        gain_In = relevance_In.square() * torch.where(rest_In > LEAST, rest_In, 0.0)
        chosen_I1 = gain_In.masked_fill(keep_In, -torch.inf).argmax(-1, keepdim=True)
        keep_In = keep_In.scatter(1, chosen_I1, True)
        place_I1n = chosen_I1[..., None].expand(-1, -1, patches)
        its_I1m = rows_Imn.gather(2, place_I1n[..., :1].expand(-1, count, -1)).transpose(1, 2)
        row_In = (alike_Inn.gather(1, place_I1n) - its_I1m @ rows_Imn)[:, 0]
        left_I1 = rest_In.gather(1, chosen_I1)
        row_In = torch.where(left_I1 > LEAST, row_In / left_I1.clamp(min=LEAST).sqrt(), 0.0)
        rest_In = rest_In - row_In.square()
        rows_Imn[:, step] = row_In
    return keep_In
