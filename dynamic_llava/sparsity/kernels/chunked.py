"""MaskedSoftmax attention in blocks of queries: linear memory forward and backward, plain torch.

Every query sees itself with weight exp(X_ii) and the strict past with the keep mask M_j, which acts on key and value
ROWS (M_j k_j, M_j v_j), so G of Eq. 7 never exists; the diagonal is a separate term of size N. The backward pass is
FlashAttention's with one more column reduction. With row maximum m, row sum Z, E_ij = exp(X_ij - m_i) for j < i
(also for dropped j, clamped), O the output and dO its gradient:

    T_ij = E_ij (<dO_i, v_j> - <dO_i, O_i>) / Z_i,   dX_ij = M_j T_ij,   dM_j = sum over heads and i > j of T_ij

With a band, G of a block of queries is made after all, once for all heads, and weights are multiplied by it instead.

Rows and heads are worked on in parts, one after the other, so that what a part needs besides its inputs and results
stays small: in a CPU's cache, or bounded on other devices.
Shape suffixes: B rows, H query heads, K key heads, G query heads per key head, N tokens, R block rows, Y keys that a
block sees, d head size. Within a part B and K are the part's own.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamic_llava.sparsity.kernels import EXPONENT_CAP, broken_tokens, compute_dtype
from dynamic_llava.sparsity.window import NEVER, Band

BLOCK_ROWS = 128
"""Queries per block (fastest of 32 to 256 on a CPU)."""
CPU_PART, DEVICE_PART = 2**18, 2**24
"""Scores in the largest block of one row's part: 1 MiB stays in a CPU's cache; 64 MiB keep an accelerator busy. Short
rows go together, up to twice as many scores: more of them at once is faster there."""


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    padding_mask: Tensor | None,
    band: Band | None,
    scale: float,
) -> Tensor:
    """Return MaskedSoftmax attention as `masked_softmax_attention` defines it, whose checked arguments these are."""
    dtype = compute_dtype(query)
    keep_BN = keep_mask.to(dtype)
    own_BN = torch.ones_like(keep_BN, requires_grad=False)
    if padding_mask is not None:
        own_BN = padding_mask.to(dtype)
        keep_BN = torch.where(padding_mask, keep_BN, 0.0)
    step_BN, until_BN = (None, None) if band is None else band.real(padding_mask)
    given = query, key, value, keep_BN, own_BN, step_BN, until_BN
    return cast(Callable[..., Tensor], _ChunkedAttention.apply)(*given, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep_BN: Tensor,
        own_BN: Tensor,
        step_BN: Tensor | None,
        until_BN: Tensor | None,
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        row_max, row_sum = (keep_BN.new_empty(query.shape[:3]) for _ in range(2))
        for part in _parts(query, key):
            seen = _Seen.of(part, keep_BN, own_BN, step_BN, until_BN)
            _part_forward(part, seen, scale, query, key, value, out, row_max, row_sum)
        ctx.save_for_backward(query, key, value, keep_BN, own_BN, step_BN, until_BN, out, row_max, row_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: gradient checkpointing recomputes them when they are asked for.
        query, key, value, keep_BN, own_BN, step_BN, until_BN, *rest = ctx.saved_tensors
        for_query, for_key, for_value, for_keep = ctx.needs_input_grad[:4]
        gradients = _Gradients(
            query=torch.empty_like(query) if for_query else None,
            key=torch.empty_like(key) if for_key else None,
            value=torch.empty_like(value) if for_value else None,
            keep=torch.zeros_like(keep_BN) if for_keep else None,
        )
        with torch.autocast(grad_out.device.type, enabled=False):
            for part in _parts(query, key):
                seen = _Seen.of(part, keep_BN, own_BN, step_BN, until_BN)
                _part_backward(part, seen, ctx.scale, gradients, grad_out, query, key, value, *rest)
        return *gradients, None, None, None, None


class _Part(NamedTuple):
    """Some rows of the batch and some key heads with their query heads."""

    rows: slice
    key_heads: slice
    query_heads: slice

    def queries(self, x_BHN: Tensor, groups: int) -> Tensor:
        """Return this part of a tensor of queries, as (B, K, G, N, ...)."""
        return x_BHN[self.rows, self.query_heads].unflatten(1, (-1, groups))

    def keys(self, x_BKN: Tensor) -> Tensor:
        """Return this part of a tensor of keys, (B, K, N, ...)."""
        return x_BKN[self.rows, self.key_heads]


class _Seen(NamedTuple):
    """What the tokens of a part's rows are to others: G of Eq. 7 without its diagonal, in rows or block by block."""

    keep: Tensor
    """(B, N): the keep mask, 0 at padding."""
    own: Tensor
    """(B, N): 1 at real tokens, 0 at padding."""
    band: Band | None

    @classmethod
    def of(
        cls, part: _Part, keep_BN: Tensor, own_BN: Tensor, step_BN: Tensor | None, until_BN: Tensor | None
    ) -> "_Seen":
        """Take the rows of a part."""
        if step_BN is None or until_BN is None:
            return cls(keep_BN[part.rows], own_BN[part.rows], None)
        return cls(keep_BN[part.rows], own_BN[part.rows], Band(step_BN[part.rows], until_BN[part.rows]))

    @property
    def rows(self) -> Tensor:
        """(B, 1, N, 1): what keys and values are multiplied by; 1 with a band, where weights are instead."""
        return (self.keep if self.band is None else torch.ones_like(self.keep))[:, None, :, None]

    @property
    def by_others(self) -> Tensor:
        """(B, N): 0 at tokens that no other sees."""
        return self.keep if self.band is None else torch.where(self.band.until != NEVER, 1.0, self.keep)

    def hidden(self, stop: int) -> Tensor:
        """(B, 1, 1, 1, Y) bool: keys before `stop` that are dropped."""
        return (self.keep == 0)[:, None, None, None, :stop]

    def block(self, rows: slice, stop: int) -> tuple[Tensor, Tensor] | None:
        """(B, 1, 1, R, Y) each: G of these queries, and, bool, where the band makes it 1; None without a band."""
        if self.band is None:
            return None
        inside = self.band.until[:, None, None, None, :stop] >= self.band.step[:, None, None, rows, None]
        return torch.where(inside, 1.0, self.keep[:, None, None, None, :stop]), inside


class _Gradients(NamedTuple):
    """Where the gradients go, in the shapes and dtypes of the inputs; None where nobody needs one."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    keep: Tensor | None


def _part_forward(
    part: _Part,
    seen: _Seen,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> None:
    """Fill the part's share of out, row_max and row_sum."""
    groups, presence_B1N1 = query.shape[1] // key.shape[1], seen.rows
    q, k, v, own_score = _load(part, seen, scale, query, key, value)
    out, row_max, row_sum = (part.queries(x, groups) for x in (out, row_max, row_sum))
    kept_v = presence_B1N1 * v
    for start, stop in _blocks(q.shape[3]):
        rows = slice(start, stop)
        score = _times_keys(q[:, :, :, rows] * scale, k[:, :, :stop])
        block = seen.block(rows, stop)
        score.masked_fill_(seen.hidden(stop) if block is None else block[0] == 0, -torch.inf)
        score[..., rows].masked_fill_(_not_past(stop - start, q.device), -torch.inf)
        block_max = torch.maximum(score.amax(dim=-1), own_score[..., rows])
        block_max = torch.where(block_max.isfinite(), block_max, 0.0)
        weight = score.sub_(block_max[..., None]).exp_()
        weight = weight if block is None else weight.mul_(block[0])
        own = (own_score[..., rows] - block_max).exp()
        block_sum = _times_values(weight, presence_B1N1[:, :, :stop])[..., 0] + own
        total = _times_values(weight, kept_v[:, :, :stop]) + own[..., None] * v[:, :, None, rows]
        out[:, :, :, rows] = total * _reciprocal(block_sum)[..., None]
        row_max[..., rows], row_sum[..., rows] = block_max, block_sum


def _part_backward(
    part: _Part,
    seen: _Seen,
    scale: float,
    gradients: _Gradients,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> None:
    """Fill the part's share of the gradients, by the formulas at the top."""
    groups, keep_B1N1 = query.shape[1] // key.shape[1], seen.rows
    q, k, v, own_score = _load(part, seen, scale, query, key, value)
    row_max, row_sum = part.queries(row_max, groups), part.queries(row_sum, groups)
    # 1 / Z_i is carried by the gradient's rows instead of by an N x N matrix.
    d_out = part.queries(grad_out, groups).to(keep_B1N1.dtype) * _reciprocal(row_sum)[..., None]
    # A row that is not a number in the output and gets no gradient must not hand one to its past: 0 * nan is nan.
    d_row = (d_out * part.queries(out, groups).to(keep_B1N1.dtype)).sum(dim=-1).nan_to_num_(0.0, torch.inf, -torch.inf)
    own = (own_score - row_max).exp()
    change_own = own * ((d_out * v[:, :, None]).sum(dim=-1) - d_row)
    kept_k = keep_B1N1 * k
    d_k, d_v = (None if grad is None else torch.zeros_like(k) for grad in (gradients.key, gradients.value))
    for start, stop in _blocks(q.shape[3]):
        rows = slice(start, stop)
        q_rows, d_out_rows = q[:, :, :, rows] * scale, d_out[:, :, :, rows]
        weight = _times_keys(q_rows, k[:, :, :stop]).sub_(row_max[..., rows, None]).clamp_(max=EXPONENT_CAP).exp_()
        weight[..., rows].masked_fill_(_not_past(stop - start, q.device), 0)
        block = seen.block(rows, stop)
        if d_v is not None:
            _add_columns(d_v[:, :, :stop], _as_seen(weight, block), d_out_rows)
        if (d_k, gradients.query, gradients.keep) == (None, None, None):
            continue
        change = _times_keys(d_out_rows, v[:, :, :stop]).sub_(d_row[..., rows, None]).mul_(weight)
        if gradients.keep is not None:
            decided = change if block is None else change.masked_fill(block[1], 0)
            gradients.keep[part.rows, :stop] += decided.sum(dim=(1, 2, 3))
        change = _as_seen(change, block)
        if d_k is not None:
            _add_columns(d_k[:, :, :stop], change, q_rows)
        if gradients.query is not None:
            d_q = _times_values(change, kept_k[:, :, :stop]) + change_own[..., rows, None] * k[:, :, None, rows]
            part.queries(gradients.query, groups)[:, :, :, rows] = d_q.mul_(scale)
    # At a dropped key these sums hold what the mask gradient needs, and may overflow: 0 * inf must not become NaN.
    if d_k is not None and gradients.key is not None:
        d_k = d_k.mul_(keep_B1N1).masked_fill_(keep_B1N1 == 0, 0)
        part.keys(gradients.key).copy_(d_k.add_((change_own[..., None] * q).sum(dim=2), alpha=scale))
    if d_v is not None and gradients.value is not None:
        d_v = d_v.mul_(keep_B1N1).masked_fill_(keep_B1N1 == 0, 0)
        part.keys(gradients.value).copy_(d_v.add_((own[..., None] * d_out).sum(dim=2)))


def _parts(query: Tensor, key: Tensor) -> Iterator[_Part]:
    """Yield the parts, as large as the largest block of scores may be: all heads of some rows, or some heads of one."""
    batch, heads, tokens, _ = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    largest = CPU_PART if query.device.type == "cpu" else DEVICE_PART
    fitting = max(1, largest // (groups * min(BLOCK_ROWS, tokens) * tokens))  # key heads, in one row or in several
    rows, heads_each = max(1, 2 * fitting // key_heads), min(fitting, key_heads)
    for row in range(0, batch, rows):
        for head in range(0, key_heads, heads_each):
            end = min(head + heads_each, key_heads)
            yield _Part(slice(row, row + rows), slice(head, end), slice(head * groups, end * groups))


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the query blocks; a block needs the keys before `stop` only."""
    for start in range(0, tokens, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, tokens)


def _as_seen(values_BKGRY: Tensor, block: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return what a block's weights, or their gradients, are after G; at dropped keys they may be infinite before."""
    if block is None:
        return values_BKGRY
    return (values_BKGRY * block[0]).masked_fill_(block[0] == 0, 0)


def _load(
    part: _Part, seen: _Seen, scale: float, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the part's queries, keys and values, and each query's score of its own key (B, K, G, N).

    Where a key is padding that score is -inf. A token that nobody else sees and that is not finite becomes zero, since
    0 * nan is nan; its own score is nan unless it is padding, so that its own row says what it is.
    """
    groups, own_B11N = query.shape[1] // key.shape[1], seen.own[:, None, None]
    q, k, v = (x.to(seen.keep.dtype) for x in (part.queries(query, groups), part.keys(key), part.keys(value)))
    broken_BKN = broken_tokens(q, k, v, seen.by_others)
    if q.device.type != "cpu" or bool(broken_BKN.any()):  # an accelerator would have to be waited for
        q = q.masked_fill(broken_BKN[:, :, None, :, None], 0)
        k, v = (x.masked_fill(broken_BKN[..., None], 0) for x in (k, v))
    score = (q * k[:, :, None]).sum(dim=-1).mul_(scale).masked_fill_(broken_BKN[:, :, None], torch.nan)
    return q, k, v, score.masked_fill_(own_B11N == 0, -torch.inf)


def _not_past(rows: int, device: torch.device) -> Tensor:
    """Return (R, R), True where a key of the block is the query itself or lies in its future."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).triu()


def _reciprocal(row_sum: Tensor) -> Tensor:
    """Return 1 / Z, and 0 for a query that sees nothing."""
    return torch.where(row_sum > 0, 1 / row_sum, 0.0)


def _times_keys(rows_BKGRd: Tensor, keys_BKYd: Tensor) -> Tensor:
    """Return rows @ keys^T, (B, K, G, R, Y): the query heads of a group share one product."""
    product = rows_BKGRd.flatten(2, 3) @ keys_BKYd.transpose(-1, -2)
    return product.view(*rows_BKGRd.shape[:4], -1)


def _times_values(weight_BKGRY: Tensor, values_BKYd: Tensor) -> Tensor:
    """Return weight @ values, (B, K, G, R, d)."""
    product = weight_BKGRY.flatten(2, 3) @ values_BKYd
    return product.view(*weight_BKGRY.shape[:4], -1)


def _add_columns(total_BKYd: Tensor, weight_BKGRY: Tensor, rows_BKGRd: Tensor) -> None:
    """Add weight^T @ rows, summed over the query heads of a group, to `total` in place."""
    total_BKYd += weight_BKGRY.flatten(2, 3).transpose(-1, -2) @ rows_BKGRd.flatten(2, 3)
