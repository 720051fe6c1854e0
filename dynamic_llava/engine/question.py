"""What a cut behind some layers is shown of each row's first question, and of the layer before the cut while it runs.

Everything is taken from the layer's own queries, keys and output: no layer has to return its attention weights, none
runs another kernel.
Shape suffixes: B rows, C computed tokens, I images, t question tokens of the longest, D hidden size, H query heads, K
key heads, d head size.
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
        self._asked, self._asking, self._rotation = asked, asking, rotation
        self.seen: dict[Evidence, Tensor] = {}
        """(B, C, ...) of each evidence; empty until the layer has run."""

    @torch.no_grad()
    def read(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take what is asked for from queries (B, H, C, d) and keys (B, K, C, d)."""
        if "keys" in self._asked:
            self.seen["keys"] = self._from_zero(key).transpose(1, 2).flatten(2)
        if "rotation" in self._asked:
            self.seen["rotation"] = torch.cat(self._rotation, dim=-1).expand(len(key), -1, -1)
        if "question_row" in self._asked:
            end_B1 = self._asking.question_end()[:, None]
            self.seen["question_row"] = self._rows(query, key, scaling, end_B1)[:, :, 0].mean(1)
        if "question_rows" in self._asked:
            rows_BHtC = self._rows(query, key, scaling, question_packing(self._asking).index)
            self.seen["question_rows"] = rows_BHtC.permute(0, 3, 2, 1)

    def _rows(self, query: Tensor, key: Tensor, scaling: float, place_Bt: Tensor) -> Tensor:
        """(B, H, t, C) float32: the attention of the tokens at place_Bt (B, t) int64 to kept ones up to themselves."""
        batch, heads, tokens, width = query.shape
        rows_BHtd = query.gather(2, place_Bt[:, None, :, None].expand(batch, heads, place_Bt.shape[1], width))
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        scores_BHtC = (rows_BHtd @ key.transpose(2, 3)).float() * scaling
        before_BtC = torch.arange(tokens, device=query.device) <= place_Bt[..., None]
        seen_BtC = self._asking.valid[:, None] & before_BtC
        return scores_BHtC.masked_fill(~seen_BtC[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)

    def _from_zero(self, key: Tensor) -> Tensor:
        """Turn keys (B, K, C, d) back by the position of each row's first token, where padding may have put it."""
        first_B = self._asking.valid.to(torch.uint8).argmax(1)
        rows_B = torch.arange(len(first_B), device=first_B.device)
        cos_B11d, sin_B11d = (one.expand(len(key), -1, -1)[rows_B, first_B][:, None, None] for one in self._rotation)
        return key * cos_B11d - rotate_half(key) * sin_B11d


def question_packing(asking: TokenLayout) -> Packing:
    """Return the gather of each row's question: the prompt tokens behind its first image, and the last token."""
    end_BC = torch.arange(asking.valid.shape[1], device=asking.valid.device) == asking.question_end()[:, None]
    return Packing.of(asking.valid & (end_BC | (asking.prompt & (asking.is_image.cumsum(1) > 0))))


@torch.no_grad()
def relevance(hidden_BCD: Tensor, asking: TokenLayout) -> Tensor:
    """(B, C) float32: at each token of a row's question what its image tokens look for in it (`relevance`); else 0."""
    packing = question_packing(asking)
    asked_BtD = packing.take(hidden_BCD).float()
    scores_BCt = (hidden_BCD.float() @ asked_BtD.transpose(1, 2)).masked_fill(~packing.valid[:, None], -torch.inf)
    image_BC1 = asking.is_image[..., None]
    looks_BCt = scores_BCt.softmax(-1).nan_to_num(0.0) * image_BC1
    mean_Bt = looks_BCt.sum(1) / image_BC1.sum(1).clamp(min=1)
    found_BC = torch.zeros_like(hidden_BCD[..., 0], dtype=torch.float32)
    return found_BC.scatter_add(1, packing.index, (mean_Bt * packing.valid).float())  # autocast rounds products


def question_of(asking: TokenLayout, rows_I: Tensor, seen: Mapping[Evidence, Tensor]) -> QuestionTokens:
    """Return the question that each image is asked about; `seen` holds (B, C, ...), rows_I (I,) int64 images' rows."""
    packing, place_C = question_packing(asking), torch.arange(asking.valid.shape[1], device=rows_I.device)
    last_I = torch.zeros_like(rows_I).scatter_reduce(
        0, asking.image[asking.is_image], place_C.expand_as(asking.image)[asking.is_image], "amax"
    )
    is_end_It = packing.index[rows_I] == asking.question_end()[rows_I, None]
    behind_It = (packing.index[rows_I] > last_I[:, None]) | is_end_It
    shown = {name: packing.take(values)[rows_I] for name, values in seen.items() if name in TOKEN_EVIDENCE}
    return QuestionTokens(packing.valid[rows_I] & behind_It, shown)
