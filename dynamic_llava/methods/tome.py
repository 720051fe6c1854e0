"""Token merging (ToMe; Bolya et al., ICLR 2023, arXiv:2210.09461), before the language model, on projected features.

Bipartite soft matching: an image's tokens are dealt out in turn to two sets; each token of the first is tied to the
most similar of the second, and the most similar ties are merged. A merged token is the mean of all it stands for. One
round can at most halve the tokens, so a lower rate takes several; the original merges inside a vision transformer, a
few tokens in each layer. Similarity is the cosine.
Shape suffixes: I images, n image tokens, m image tokens left, D hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Choice, Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget


@dataclass(frozen=True)
class ToMe(Method):
    """Training-free merging of similar image tokens before the language model; output tokens all stay."""

    name: ClassVar[str] = "tome"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.5
    """Number of tokens that each image is merged into, as a share of its own."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut, before the language model."""
        return (Cut(0),)

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Choice:
        """Which tokens are left of each image, and which of them stands for each other; all count alike."""
        longest = images.valid.shape[1]
        heirs = []
        for hidden_nD, valid_n in zip(images.hidden, images.valid, strict=True):
            tokens = int(valid_n.sum())
            heir_n = torch.arange(longest, device=valid_n.device)
            heir_n[:tokens] = merged(hidden_nD[:tokens].float(), budget(self.image_keep_rate, tokens))
            heirs.append(heir_n)
        heir_In = torch.stack(heirs) if heirs else torch.zeros_like(images.valid, dtype=torch.int64)
        itself_n = torch.arange(longest, device=heir_In.device)
        return Choice(keep=(heir_In == itself_n) & images.valid, into=heir_In)


def merged(features_nD: Tensor, count: int) -> Tensor:
    """Merge n tokens until `count` are left; (n,) int64: the token that stands for each, itself where it is left."""
    heir_n = torch.arange(len(features_nD), device=features_nD.device)
    while True:
        left_m = (heir_n == torch.arange(len(heir_n), device=heir_n.device)).nonzero()[:, 0]
        surplus = len(left_m) - count
        if surplus <= 0:
            return heir_n
        sizes_n = torch.bincount(heir_n, minlength=len(heir_n))
        mean_nD = torch.zeros_like(features_nD).index_add(0, heir_n, features_nD) / sizes_n.clamp(min=1)[:, None]
        unit_mD = F.normalize(mean_nD[left_m], dim=-1)
        nearest, partner = (unit_mD[::2] @ unit_mD[1::2].T).max(1)
        given = torch.sort(nearest, descending=True, stable=True).indices[:surplus]
        goes_n = torch.arange(len(heir_n), device=heir_n.device)
        goes_n[left_m[::2][given]] = left_m[1::2][partner[given]]
        heir_n = goes_n[heir_n]
