"""How much attention each stored token receives, per key head: what methods that evict tokens decide by.

Recomputed from queries and keys, so that no layer has to return its attention weights. Queries go in parts: what is
alive at a time is a part's weights, not (Q, W) of them.
Shape suffixes: B rows, H query heads, K key heads, Q queries, W keys.
"""

import torch
from torch import Tensor

PART_NUMBERS = 1 << 24
"""Attention weights that are alive at a time, 64 MiB of them."""


def attention_mass(
    query: Tensor, keys: Tensor, seen: Tensor, *, counts: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Sum the attention weights that each key receives over queries and the query heads of a key head.

    query (B, H, Q, D); keys (B, K, W, D), K dividing H; seen: bool, which key each query attends to, broadcastable to
    (B, K, Q, W); counts (B, Q) bool: queries that are summed, all by default; scale: 1 / sqrt(D) by default. Returns
    (B, K, W) float32. A query that attends to nothing adds nothing. No gradient is recorded. Raises ValueError.
    """
    if query.dim() != 4 or keys.dim() != 4 or query.shape[1] % keys.shape[1] or query.shape[::3] != keys.shape[::3]:
        raise ValueError(
            f"query {tuple(query.shape)} and keys {tuple(keys.shape)} do not fit; give (B, H, Q, D) and (B, K, W, D), "
            "K dividing H"
        )
    batch, heads, queries, _ = query.shape
    key_heads, slots = keys.shape[1:3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen_BKQW = seen.expand(batch, key_heads, queries, slots)
    counts_BQ = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if counts is None else counts
    mass_BKW = torch.zeros(batch, key_heads, slots, dtype=torch.float32, device=query.device)
    with torch.no_grad():
        for part in torch.arange(queries).split(max(1, PART_NUMBERS // (batch * heads * slots))):
            cut = slice(int(part[0]), int(part[-1]) + 1)
            query_BKGqD = query[:, :, cut].unflatten(1, (key_heads, -1))
            scores_BKGqW = (query_BKGqD @ keys[:, :, None].transpose(3, 4)).float() * scale
            hidden_BK1qW = ~seen_BKQW[:, :, None, cut]
            weights_BKGqW = scores_BKGqW.masked_fill(hidden_BK1qW, -torch.inf).softmax(-1).nan_to_num(0.0)
            mass_BKW += torch.einsum("bkgqw,bq->bkw", weights_BKGqW, counts_BQ[:, cut].float())
    return mass_BKW


def latest(valid_BQ: Tensor, count: int) -> Tensor:
    """(B, Q) bool: the last `count` valid tokens of each row."""
    behind_BQ = valid_BQ.flip(1).cumsum(1).flip(1)
    return valid_BQ & (behind_BQ <= count)
