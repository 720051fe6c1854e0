"""MaskedSoftmax attention in blocks of queries: linear memory forward and backward, plain torch.

Every query sees itself with weight exp(X_ii) and the strict past with the keep mask M_j, which acts on key and value
ROWS (M_j k_j, M_j v_j), so G of Eq. 7 never exists; the diagonal is a separate term of size N. The backward pass is
FlashAttention's with one more column reduction. With row maximum m, row sum Z, E_ij = exp(X_ij - m_i) for j < i
(also for dropped j, clamped), O the output and dO its gradient:

    T_ij = E_ij (<dO_i, v_j> - <dO_i, O_i>) / Z_i,   dX_ij = M_j T_ij,   dM_j = sum over heads and i > j of T_ij

Shape suffixes: B batch, K key heads, G query heads per key head, N tokens, R rows of a block, S keys it can see,
D head size.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamic_llava.sparsity.kernels import EXPONENT_CAP, compute_dtype

BLOCK_ROWS = 64
"""Queries per block (fastest of 32 to 256 on a CPU); transient memory is a few (B, H, BLOCK_ROWS, N) buffers."""


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, keep_mask: Tensor, padding_mask: Tensor | None, scale: float
) -> Tensor:
    """Return MaskedSoftmax attention as `masked_softmax_attention` defines it, whose checked arguments these are."""
    dtype = compute_dtype(query)
    keep_BN = keep_mask.to(dtype)
    own_BN = torch.ones_like(keep_BN, requires_grad=False)
    if padding_mask is not None:
        own_BN = padding_mask.to(dtype)
        keep_BN = torch.where(padding_mask, keep_BN, 0.0)
    return cast(Callable[..., Tensor], _ChunkedAttention.apply)(query, key, value, keep_BN, own_BN, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep_BN: Tensor, own_BN: Tensor, scale: float
    ) -> Tensor:
        q, k, v = _grouped(query, key, value, keep_BN.dtype)
        out_BKGND = torch.empty_like(q)
        row_max, row_sum = q.new_empty(q.shape[:4]), q.new_empty(q.shape[:4])
        kept_v = keep_BN[:, None, :, None] * v
        own_score = _own_score(q, k, own_BN, scale)
        dropped_B111N = (keep_BN == 0)[:, None, None, None, :]
        for start, stop in _blocks(q.shape[3]):
            rows = slice(start, stop)
            score = _times_keys(q[:, :, :, rows] * scale, k[:, :, :stop])
            score.masked_fill_(dropped_B111N[..., :stop], -torch.inf)
            score[..., rows].masked_fill_(_not_past(stop - start, q.device), -torch.inf)
            block_max = torch.maximum(score.amax(dim=-1), own_score[..., rows])
            block_max = torch.where(block_max.isfinite(), block_max, 0.0)
            weight = score.sub_(block_max[..., None]).exp_()
            own = (own_score[..., rows] - block_max).exp()
            block_sum = _times_values(weight, keep_BN[:, None, :stop, None])[..., 0] + own
            total = _times_values(weight, kept_v[:, :, :stop]) + own[..., None] * v[:, :, None, rows]
            out_BKGND[:, :, :, rows] = total * _reciprocal(block_sum)[..., None]
            row_max[..., rows], row_sum[..., rows] = block_max, block_sum
        out = out_BKGND.flatten(1, 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, keep_BN, own_BN, out, row_max, row_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return *_gradients(ctx.scale, grad_out, *ctx.saved_tensors), None, None


def _gradients(
    scale: float,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_BN: Tensor,
    own_BN: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and keep mask by the formulas at the top."""
    dtype = keep_BN.dtype
    q, k, v = _grouped(query, key, value, dtype)
    # 1 / Z_i is carried by the gradient's rows instead of by an N x N matrix.
    d_out = grad_out.to(dtype).reshape(q.shape) * _reciprocal(row_sum)[..., None]
    d_row = (d_out * out.to(dtype).reshape(q.shape)).sum(dim=-1)
    keep_B1N1 = keep_BN[:, None, :, None]
    kept_k = keep_B1N1 * k
    d_q = torch.empty_like(q)
    d_k, d_v, d_keep = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(keep_BN)
    for start, stop in _blocks(q.shape[3]):
        rows = slice(start, stop)
        q_rows, d_out_rows = q[:, :, :, rows] * scale, d_out[:, :, :, rows]
        exponent = _times_keys(q_rows, k[:, :, :stop]).sub_(row_max[..., rows, None])
        weight = exponent.clamp_(max=EXPONENT_CAP).exp_()
        weight[..., rows].masked_fill_(_not_past(stop - start, q.device), 0)
        _add_columns(d_v[:, :, :stop], weight, d_out_rows)
        change = _times_keys(d_out_rows, v[:, :, :stop]).sub_(d_row[..., rows, None]).mul_(weight)
        _add_columns(d_k[:, :, :stop], change, q_rows)
        d_keep[:, :stop] += change.sum(dim=(1, 2, 3))
        d_q[:, :, :, rows] = _times_values(change, kept_k[:, :, :stop])
    own = (_own_score(q, k, own_BN, scale) - row_max).exp()
    change_own = own * ((d_out * v[:, :, None]).sum(dim=-1) - d_row)
    d_q = (d_q + change_own[..., None] * k[:, :, None]) * scale
    # At a dropped key these sums hold what the mask gradient needs, and may overflow: 0 * inf must not become NaN.
    d_k = (keep_B1N1 * d_k).masked_fill_(keep_B1N1 == 0, 0) + (change_own[..., None] * q).sum(dim=2) * scale
    d_v = (keep_B1N1 * d_v).masked_fill_(keep_B1N1 == 0, 0) + (own[..., None] * d_out).sum(dim=2)
    return d_q.flatten(1, 2).to(query.dtype), d_k.to(key.dtype), d_v.to(value.dtype), d_keep


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the query blocks; a block needs the keys before `stop` only."""
    for start in range(0, tokens, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, tokens)


def _grouped(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, K, G, N, D), k and v (B, K, N, D) in the compute dtype."""
    key_heads = key.shape[1]
    batch, heads, tokens, size = query.shape
    q_BKGND = query.to(dtype).reshape(batch, key_heads, heads // key_heads, tokens, size)
    return q_BKGND, key.to(dtype), value.to(dtype)


def _own_score(q_BKGND: Tensor, k_BKND: Tensor, own_BN: Tensor, scale: float) -> Tensor:
    """Return each query's score of its own key (B, K, G, N), -inf where that key is padding."""
    score = (q_BKGND * k_BKND[:, :, None]).sum(dim=-1) * scale
    return score.masked_fill(own_BN[:, None, None, :] == 0, -torch.inf)


def _not_past(rows: int, device: torch.device) -> Tensor:
    """Return (R, R), True where a key of the block is the query itself or lies in its future."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu()


def _reciprocal(row_sum: Tensor) -> Tensor:
    """Return 1 / Z, and 0 for a query that sees nothing."""
    return torch.where(row_sum > 0, 1 / row_sum, 0.0)


def _times_keys(rows_BKGRD: Tensor, keys_BKSD: Tensor) -> Tensor:
    """Return rows @ keys^T, (B, K, G, R, S): the query heads of a group share one product."""
    product = rows_BKGRD.flatten(2, 3) @ keys_BKSD.transpose(-1, -2)
    return product.view(*rows_BKGRD.shape[:4], -1)


def _times_values(weight_BKGRS: Tensor, values_BKSD: Tensor) -> Tensor:
    """Return weight @ values, (B, K, G, R, D)."""
    product = weight_BKGRS.flatten(2, 3) @ values_BKSD
    return product.view(*weight_BKGRS.shape[:4], -1)


def _add_columns(total_BKSD: Tensor, weight_BKGRS: Tensor, rows_BKGRD: Tensor) -> None:
    """Add weight^T @ rows, summed over the query heads of a group, to `total` in place."""
    total_BKSD += weight_BKGRS.flatten(2, 3).transpose(-1, -2) @ rows_BKGRD.flatten(2, 3)
