"""Llama attention with MaskedSoftmax (Eq. 7) where a keep mask rides along, on a ragged cache where a decoding step has
filled its rows to different lengths, and one recomputed attention row.

Shape suffixes: B rows, N tokens, H heads, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

from dynamic_llava.model.cache_names import CACHE
from dynamic_llava.sparsity.masked_softmax import masked_softmax_attention
from dynamic_llava.sparsity.ragged_attention import ragged_attention


class DynamicLlamaAttention(LlamaAttention):
    """transformers' LlamaAttention, and two attentions of ours, chosen by what is given.

    With `masked_softmax`, dropped tokens are masked by Eq. 7 instead of removed; with `filled`, one new token of each
    row attends to the filled slots of an admission cache.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked_softmax: str | None = None,
        filled: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from (B, N, D) to (B, N, D).

        masked_softmax names an implementation of MaskedSoftmax; attention_mask is then the keep mask, (B, N) float,
        1 = kept, its gradient is exact, and padding_mask is (B, N) bool, True = real token; both belong to a whole
        sequence without cache. (The keep mask is a layer's second positional argument because a reentrant checkpoint
        gives gradients to positional arguments alone.) filled is (B,) int64, the slots that each row of the cache has
        filled before its new token (N = 1). With neither of them this is the parent's forward.
        """
        if filled is not None:
            return self._attend_to_slots(hidden_states, position_embeddings, filled, kwargs[CACHE])
        if masked_softmax is None:
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        if kwargs.get(CACHE) is not None or position_embeddings is None:
            raise ValueError("a keep mask needs the whole sequence: no cache, and position_embeddings for every token")
        if self.training and self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not supported with MaskedSoftmax; set it to 0"
            )
        query, key, value = self._project(hidden_states, position_embeddings)
        out_BHNd = masked_softmax_attention(
            query,
            key,
            value,
            attention_mask,
            padding_mask=padding_mask,
            scale=self.scaling,
            implementation=masked_softmax,
        )
        out_BND = out_BHNd.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(out_BND), None

    def _attend_to_slots(
        self, hidden_B1D: Tensor, rotation: tuple[Tensor, Tensor], filled_B: Tensor, cache: Any
    ) -> tuple[Tensor, None]:
        query, key, value = self._project(hidden_B1D, rotation)
        keys, values = cache.update(key, value, self.layer_idx)
        out_BH1d = ragged_attention(query, keys, values, filled_B, scale=self.scaling)
        return self.o_proj(out_BH1d.flatten(1)[:, None]), None

    def _project(self, hidden_BND: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*hidden_BND.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_BND).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_BND).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_BND).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        # Under autocast the rotary embedding leaves them in float32.
        return query.to(value.dtype), key.to(value.dtype), value


def cache_mask(visible_BQW: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Return (B, Q, W) bool as the 4D mask of an attention implementation: bool for sdpa, additive for eager."""
    visible = visible_BQW[:, None]
    if implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def attention_row(
    layer: LlamaDecoderLayer, hidden_BND: Tensor, rotation: tuple[Tensor, Tensor], query_B: Tensor, valid_BN: Tensor
) -> Tensor:
    """Recompute the head-mean attention of one query token per row in `layer`; returns (B, N) float32.

    hidden_BND is what entered the layer, query_B (B,) int64 the query's index, valid_BN (B, N) bool marks real tokens.
    One row costs O(N), so no method ever forces attention weights out of the other layers.
    """
    attention = layer.self_attn
    query, key, _ = attention._project(layer.input_layernorm(hidden_BND), rotation)
    batch, heads, tokens, width = query.shape
    row_BH1d = query.gather(2, query_B[:, None, None, None].expand(batch, heads, 1, width))
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores_BHN = (row_BH1d @ key.transpose(2, 3))[:, :, 0].float() * attention.scaling
    seen_BN = valid_BN & (torch.arange(tokens, device=query_B.device) <= query_B[:, None])
    return scores_BHN.masked_fill(~seen_BN[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
