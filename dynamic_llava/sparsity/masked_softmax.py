"""MaskedSoftmax attention (Eq. 7): every query sees itself and the KEPT keys of its past.

With scores X, keep mask M and G[i, j] = M[j] for i != j, G[i, i] = 1, over the visible keys (causal, no padding)

    P[i, j] = exp(X[i, j]) G[i, j] / sum_k exp(X[i, k]) G[i, k]

A dropped token is invisible to all others but still sees itself and the kept past. With a band (window.py) G[i, j] is 1
too where token i is in the band of token j, and the gradient into M[j] comes from the other i alone. The gradient with
respect to M is part of the method, also at dropped keys, where P is 0. Three implementations, one function: `reference`
is this formula under plain autograd; `chunked` (kernels/chunked.py, plain torch) and `triton`
(kernels/triton_attention.py, for NVIDIA GPUs) never make a tensor of size N x N. docs/kernels.md describes them.

Stability: all subtract the row maximum over the kept visible keys, which changes nothing in the formula. A dropped key
may lie above that maximum; its exponent is clamped at EXPONENT_CAP. Outputs and the gradients of query, key and value
do not depend on the clamp (a dropped key has weight 0). The gradient of M is exact as long as no score of a dropped key
exceeds its row's maximum by more than EXPONENT_CAP. Beyond that it is finite but no longer the gradient: each term of
its sum over heads and queries keeps its sign and loses size, so that the sum itself may have the other sign.
A dropped token or padding that is not finite (nan, inf) is as invisible to the others as any: its values reach no other
row and, with `reference` and `chunked`, no other token's gradient. Where it is real its own row is not finite either,
and its own mask gradient means nothing.
Shape suffixes: B rows, H query heads, K key heads, N tokens, d head size.
"""

from typing import Literal

import torch
from torch import Tensor

from dynamic_llava.sparsity.kernels import EXPONENT_CAP, broken_tokens, compute_dtype
from dynamic_llava.sparsity.kernels.choice import choose
from dynamic_llava.sparsity.kernels.chunked import chunked_attention
from dynamic_llava.sparsity.window import NEVER, Band

Implementation = Literal["auto", "reference", "chunked", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")


def masked_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    *,
    padding_mask: Tensor | None = None,
    band: Band | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Causal attention with MaskedSoftmax (Eq. 7); returns (B, H, N, d) in the query's dtype.

    query (B, H, N, d); key, value (B, K, N, d) of the same dtype, K dividing H (grouped-query attention); keep_mask
    (B, N), 1 = kept: bool, or float 0/1 with a gradient (values between 0 and 1 are weighted as Eq. 7 says);
    padding_mask (B, N) bool, True = real token, whatever the side: a padding key is invisible to every query, itself
    included, and a query that sees nothing gives 0. band: (B, N) int64 each, which tokens see which whatever keep_mask
    says; none by default. scale: 1 / sqrt(d) by default. implementation: `reference`;
    `chunked`, for every device; `triton`, for NVIDIA GPUs, float32 and half types, d up to 128; `auto`, which takes
    `triton` where it can run on a GPU and `chunked` elsewhere, and logs which and why. Sums are accumulated in float32,
    those of float64 in float64; `triton` multiplies half types as they are, the others make them float32 first.
    Raises ValueError.
    """
    _check(query, key, value, keep_mask, padding_mask, implementation)
    _check_band(band, keep_mask)
    if not query.numel():
        return query.clone()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("MaskedSoftmax", implementation, "chunked", query.device, query.dtype, query.shape[-1])
    # Autocast would turn the float32 scores back into half precision.
    with torch.autocast(query.device.type, enabled=False):
        if chosen == "reference":
            return _reference_attention(query, key, value, keep_mask, padding_mask, band, scale)
        if chosen == "chunked":
            return chunked_attention(query, key, value, keep_mask, padding_mask, band, scale)
        from dynamic_llava.sparsity.kernels.triton_attention import triton_attention

        return triton_attention(query, key, value, keep_mask, padding_mask, band, scale)


def masked_softmax_weights(
    scores_BHNN: Tensor, keep_mask_BN: Tensor, visible: Tensor, band: Band | None = None
) -> Tensor:
    """Return the weights P of Eq. 7, (B, H, N, N) in the dtype of the scores: the definition, under plain autograd.

    scores_BHNN (B, H, N, N) float32 or float64; keep_mask_BN (B, N) float or bool; visible: bool, broadcastable to the
    scores, True where query i may see key j at all (causal, no padding). Rows that see nothing are 0.
    """
    always = torch.eye(scores_BHNN.shape[-1], dtype=torch.bool, device=scores_BHNN.device)
    if band is not None:
        always = always | band.pairs()[:, None]
    presence_B1NN = torch.where(always, 1.0, keep_mask_BN.to(scores_BHNN.dtype)[:, None, None, :])
    kept_scores = scores_BHNN.detach().masked_fill(~(visible & (presence_B1NN > 0)), -torch.inf)
    row_max = kept_scores.amax(dim=-1, keepdim=True)
    row_max = torch.where(row_max.isfinite(), row_max, 0.0)
    exponent = (scores_BHNN - row_max).clamp(max=EXPONENT_CAP).masked_fill(~visible, -torch.inf)
    numerator = exponent.exp() * presence_B1NN
    total = numerator.sum(dim=-1, keepdim=True)
    # Dividing by infinity gives a row that sees nothing the value 0 and the gradient 0.
    return numerator / torch.where(total > 0, total, torch.inf)


def _reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    padding_mask: Tensor | None,
    band: Band | None,
    scale: float,
) -> Tensor:
    dtype, groups = compute_dtype(query), query.shape[1] // key.shape[1]
    real = torch.ones_like(keep_mask, dtype=torch.bool) if padding_mask is None else padding_mask
    seen = keep_mask != 0 if band is None else (keep_mask != 0) | (band.until != NEVER)
    broken = broken_tokens(query.unflatten(1, (-1, groups)), key, value, seen & real)
    broken = broken.repeat_interleave(groups, dim=1)[..., None]
    key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    wide, key, value = (x.to(dtype).masked_fill(broken, 0) for x in (query, key, value))
    tokens = query.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril() & real[:, None, None]
    scores = wide @ key.transpose(-1, -2) * scale
    output = masked_softmax_weights(scores, keep_mask, visible, band) @ value
    return output.masked_fill(broken & real[:, None, :, None], torch.nan).to(query.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    padding_mask: Tensor | None,
    implementation: str,
) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; choose one of {IMPLEMENTATIONS}")
    if query.dim() != 4 or key.shape != value.shape or key.dim() != 4 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit; give query "
            "(B, H, N, d) and key, value (B, K, N, d) with K dividing H"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in B, N or d; make them equal")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; give one float dtype")
    rows = (query.shape[0], query.shape[2])
    if keep_mask.shape != rows:
        raise ValueError(f"keep_mask has shape {tuple(keep_mask.shape)}; give {rows}, one entry per token")
    if keep_mask.dtype == torch.float16 and keep_mask.requires_grad:
        raise ValueError("the gradient of a float16 keep_mask overflows; give a float32 keep_mask")
    if padding_mask is not None and (padding_mask.shape != rows or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}; give bool of shape {rows}"
        )


def _check_band(band: Band | None, keep_mask: Tensor) -> None:
    for name, values in () if band is None else zip(Band._fields, band, strict=True):
        if values.shape != keep_mask.shape or values.dtype != torch.int64:
            raise ValueError(
                f"the band's {name} is {values.dtype} of shape {tuple(values.shape)}; give int64 of shape "
                f"{tuple(keep_mask.shape)}, one entry per token"
            )
