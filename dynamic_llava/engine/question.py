"""What a cut behind some layers is shown of each row's first question, and of the layer before the cut while it runs.

Everything is taken from the layer's own queries, keys and output: no layer has to return its attention weights, none
runs another kernel.
Shape suffixes: B rows, C computed tokens, I images, t question tokens of the longest, H query heads, K key heads, d
head size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from dynamic_llava.layout import Packing, TokenLayout
from dynamic_llava.methods import TOKEN_EVIDENCE, Evidence, QuestionTokens


class QuestionReading:
    """What is read in the attention of the layer before a cut; what is not asked for is not computed."""

    def __init__(self, asked: frozenset[Evidence], asking: TokenLayout, rotation: tuple[Tensor, Tensor]) -> None:
        """`asking` is the layer's layout, in which everything from a row's first answer on counts as output.

        `rotation` holds the cosines and sines of the tokens' positions, (1 or B, C, d) each.
        """
        self._asked, self._end_B, self._valid_BC = asked, asking.question_end(), asking.valid
        self._rotation = rotation
        self.seen: dict[Evidence, Tensor] = {}
        """(B, C, ...) of each evidence; empty until the layer has run."""

    @torch.no_grad()
    def read(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take what is asked for from queries (B, H, C, d) and keys (B, K, C, d)."""
        if "keys" in self._asked:
            self.seen["keys"] = self._from_zero(key).transpose(1, 2).flatten(2)
        if "question_row" not in self._asked:
            return
        batch, heads, tokens, width = query.shape
        row_BH1d = query.gather(2, self._end_B[:, None, None, None].expand(batch, heads, 1, width))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        scores_BHC = (row_BH1d @ key.transpose(2, 3))[:, :, 0].float() * scaling
        seen_BC = self._valid_BC & (torch.arange(tokens, device=query.device) <= self._end_B[:, None])
        weights_BHC = scores_BHC.masked_fill(~seen_BC[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        self.seen["question_row"] = weights_BHC.mean(1)

    def _from_zero(self, key: Tensor) -> Tensor:
        """Turn keys (B, K, C, d) back by the position of each row's first token, where padding may have put it."""
        first_B = self._valid_BC.to(torch.uint8).argmax(1)
        rows_B = torch.arange(len(first_B), device=first_B.device)
        cos_B11d, sin_B11d = (one.expand(len(key), -1, -1)[rows_B, first_B][:, None, None] for one in self._rotation)
        return key * cos_B11d - rotate_half(key) * sin_B11d


def question_of(asking: TokenLayout, rows_I: Tensor, seen: Mapping[Evidence, Tensor]) -> QuestionTokens:
    """Return the question that each image is asked about; `seen` holds (B, C, ...), rows_I (I,) int64 images' rows."""
    place_C = torch.arange(asking.valid.shape[1], device=rows_I.device)
    end_BC = place_C == asking.question_end()[:, None]
    behind_BC = asking.prompt & (asking.is_image.cumsum(1) > 0)
    packing = Packing.of(asking.valid & (behind_BC | end_BC))
    last_I = torch.zeros_like(rows_I).scatter_reduce(
        0, asking.image[asking.is_image], place_C.expand_as(asking.image)[asking.is_image], "amax"
    )
    behind_It = (packing.index[rows_I] > last_I[:, None]) | packing.take(end_BC)[rows_I]
    shown = {name: packing.take(values)[rows_I] for name, values in seen.items() if name in TOKEN_EVIDENCE}
    return QuestionTokens(packing.valid[rows_I] & behind_It, shown)
