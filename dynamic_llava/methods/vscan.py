"""VScan (Zhang et al., TMLR 2026, arXiv:2505.22654): a local and a global scan of the image, then a cut half-way.

Before the language model, text unseen, half of a wide budget is spent in windows of 6 x 6 patches, as many in each, on
the patches that the class token attends to most in a shallow layer of the vision tower; the other half on those that it
attends to most in the layer whose features the projector reads. Each other token goes to the one that is most like it,
by the cosine of projected features, and a token becomes the mean of all that it stands for. At half of the language
model's depth a third of them stays, those that the question's last token attends to most. The published average of 64
tokens is 96, of which layer 16 of 32 leaves 32: rate 0.0556 of 576. Averages of 128 and 192 are rates 0.1112, 0.1667.
Source: Tencent/SelfEvolvingAgent a82450e, VScan/llava/model/llava_arch.py, llava_llama_x.py. The shallow layer is there
the sixth of 24; here it is said as a share of the depth. Ours: the local half is as many patches a window as it holds
whole, and what is over goes to the global scan, where theirs goes lost; windows at the edge may be smaller; the row of
attention is that of the layer before the cut; ties go to the earlier patch; kept tokens keep their positions.
Shape suffixes: I images, n image tokens, D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import Choice, Cut, ImageTokens, Method
from dynamic_llava.sparsity.decisions import budget, budgets, top_k_keep


@dataclass(frozen=True)
class VScan(Method):
    """Training-free: patches by class-token attention in windows and in all, merged; then tokens by the question's."""

    name: ClassVar[str] = "vscan"
    training_free: ClassVar[bool] = True

    image_keep_rate: float = 0.0556
    """Share of each image's tokens that is left in the end."""
    wider: int = 3
    """How many times as many tokens enter the language model."""
    layer: int | None = None
    """The layer before which the others are dropped; None: at half of the depth."""
    local_share: float = 0.5
    """Share of the tokens that enter which is chosen in windows, from 0 to 1."""
    window: int = 6
    """Patches a side of a window."""
    shallow_depth: float = 0.25
    """How deep in the tower the shallow layer is, from 0 to 1: layer 6 of 24."""

    def __post_init__(self) -> None:
        check_keep_rate("image_keep_rate", self.image_keep_rate)
        for name in ("wider", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is no count; give an int of 1 or more")
        for name in ("local_share", "shallow_depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is no share; give a number from 0 to 1")
        if self.layer == 0:
            raise ValueError("layer=0 is before the language model, where the first cut is; give a layer of 1 or more")

    def cuts(self, layers: int) -> tuple[Cut, ...]:
        """One cut before the language model, and one in it."""
        scans = Cut(0, frozenset({"class_row", "early_class_row"}), early_depth=self.shallow_depth)
        middle = max(1, layers // 2) if self.layer is None else self.layer
        return scans, Cut(middle, frozenset({"question_row"}))

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor | Choice:
        """Before the language model what the scans choose, the rest merged in; later what the question looks at."""
        if cut.layer:
            total_I = budgets(self.image_keep_rate, images.tokens)
            return top_k_keep(images.seen["question_row"], total_I, valid=images.valid)
        early_In, patches = images.seen["early_class_row"], images.valid.shape[1]
        wide = min(patches, self.wider * budget(self.image_keep_rate, patches)) if patches else 0
        local_In = best_in_windows(early_In, self.window, int(wide * self.local_share))
        keep_In = local_In | top_k_keep(images.seen["class_row"], wide - local_In.sum(1), valid=~local_In)
        unit_InD = F.normalize(images.hidden.float(), dim=-1)
        alike_Inn = (unit_InD @ unit_InD.transpose(1, 2)).masked_fill(~keep_In[:, None], -torch.inf)
        return Choice(keep_In, into=alike_Inn.argmax(-1))


def best_in_windows(score_In: Tensor, side: int, count: int) -> Tensor:
    """(I, n) bool: in each window of side x side patches as many of the best as `count` patches leave it whole."""
    grid = math.isqrt(score_In.shape[1])
    across, place_n = -(-grid // side), torch.arange(grid * grid, device=score_In.device)
    window_n = place_n // grid // side * across + place_n % grid // side
    keep_In = torch.zeros_like(score_In, dtype=torch.bool)
    for number in range(across * across):
        keep_In = keep_In | top_k_keep(score_In, count // across**2, valid=(window_n == number).expand_as(keep_In))
    return keep_In
