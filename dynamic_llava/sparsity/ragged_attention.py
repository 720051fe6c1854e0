"""Attention of one new token per row over a cache whose rows are filled to different lengths (Sec. 3.3.2).

Row b sees slots 0 .. lengths[b] inclusive: the token itself lies in slot lengths[b]. Where tokens are evicted per key
head, head k of row b sees slots 0 .. lengths[b, k]. Nothing here is read on the host, so that a decoding step can be
compiled into one graph and replayed.
Shape suffixes: B rows, H query heads, K key heads, G query heads per key head, W slots (capacity), d head size.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dynamic_llava.sparsity.cache import TokenSlots
from dynamic_llava.sparsity.kernels.choice import choose

RaggedImplementation = Literal["auto", "sdpa", "triton"]
RAGGED_IMPLEMENTATIONS = ("auto", "sdpa", "triton")


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    implementation: RaggedImplementation = "auto",
) -> Tensor:
    """Attend from one query per row to the filled slots of that row; returns (B, H, 1, d) in the query's dtype.

    query (B, H, 1, d); keys, values (B, K, W, d), one float dtype, K dividing H (grouped-query attention); lengths
    (B,) or (B, K) int64, from 0 to W - 1, on the same device: row b sees slots 0 .. lengths[b], or the query heads of
    key head k in row b slots 0 .. lengths[b, k]. visible, (B, 1, W) or (B, K, 1, W) bool, says the same as lengths, for
    `sdpa` alone: made once (`TokenSlots.visible`) it serves many layers; it is made here by default.
    scale: 1 / sqrt(d) by default.
    implementation: `sdpa` is torch's attention under a mask; it reads every slot, so that unfilled ones must be
    finite. `triton` (NVIDIA GPUs, or the CPU in Triton's interpreter) never reads an unfilled slot; `auto` takes
    `triton` inside a compiled graph where it can run on a GPU, else `sdpa`. Serves inference: `triton` has no gradient,
    and refuses to run where one would be recorded. Raises ValueError.
    """
    _check(query, keys, values, lengths, visible, implementation)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    size = query.shape[-1]
    if implementation == "auto" and not torch.compiler.is_compiling():
        # Launching two kernels of Triton's took 0.15 to 0.3 ms on an H200, sdpa 0.09 to 0.14; a graph launches nothing.
        implementation = "sdpa"
    if choose("ragged attention", implementation, "sdpa", query.device, query.dtype, size) == "sdpa":
        return _masked_sdpa(query, keys, values, lengths, visible, scale)
    from dynamic_llava.sparsity.kernels.triton_ragged import ragged_decode

    return ragged_decode(query, keys, values, lengths, scale)


def _masked_sdpa(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    visible = TokenSlots(lengths).visible(keys.shape[2]) if visible is None else visible
    visible_BK1W = visible[:, None] if visible.dim() == 3 else visible  # K is 1 for all heads alike
    # The query heads of a key head stand in the place of queries: keys and values are neither repeated nor read twice.
    query_BKGd = query.view(query.shape[0], keys.shape[1], -1, query.shape[3])
    out_BKGd = F.scaled_dot_product_attention(query_BKGd, keys, values, attn_mask=visible_BK1W, scale=scale)
    return out_BKGd.reshape(query.shape)


def _check(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor | None, implementation: str
) -> None:
    if implementation not in RAGGED_IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; choose one of {RAGGED_IMPLEMENTATIONS}")
    if query.dim() != 4 or query.shape[2] != 1 or keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)} do not fit; give "
            "query (B, H, 1, d) and keys, values (B, K, W, d)"
        )
    if query.shape[0] != keys.shape[0] or query.shape[3] != keys.shape[3] or query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and keys {tuple(keys.shape)} differ in B or d, or K does not divide H"
        )
    if not query.dtype == keys.dtype == values.dtype or not query.is_floating_point():
        raise ValueError(f"query, keys, values are {query.dtype}, {keys.dtype}, {values.dtype}; give one float dtype")
    if lengths.shape not in (keys.shape[:1], keys.shape[:2]) or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; give int64 of shape ({query.shape[0]},), or "
            f"{tuple(keys.shape[:2])} for a length of each key head"
        )
    if visible is not None and (visible.shape != (*lengths.shape, 1, keys.shape[2]) or visible.dtype != torch.bool):
        raise ValueError(
            f"visible is {visible.dtype} of shape {tuple(visible.shape)}; give bool of shape "
            f"{(*lengths.shape, 1, keys.shape[2])}, or leave it out"
        )
