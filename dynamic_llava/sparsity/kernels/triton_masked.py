"""Triton kernels of MaskedSoftmax attention (Eq. 7) and of its gradients; launched by triton_attention.py.

A query sees itself and the kept keys of its past. Its own key is a term per row, not a tile: the forward pass starts
from it. The other keys come from a LIST of positions, kept keys first and in order, so that dropped keys cost nothing
wherever they lie, and no loop needs a branch. With row maximum m and row sum Z over what a query sees, O the output,
dO its gradient, D_i = <dO_i, O_i>, and E_ij = exp(X_ij - m_i) for j < i, also at dropped keys, clamped:

    T_ij = E_ij / Z_i (<dO_i, v_j> - D_i),   dX_ij = M_j T_ij,   dM_j = sum over heads and i > j of T_ij

With a band (window.py) the list begins with all keys that some query sees, and M_j is 1 for queries in the band of j,
which then have no part in dM_j. Only dM needs dropped keys. No kernel adds to memory atomically: each result has one
owner, so runs repeat bit by bit.
All exponents are base 2. row_max is m; row_log_sum is log2 Z, and infinite where a query sees nothing (weights 0).
Dimensions: strides are named TENSOR_b, TENSOR_h, TENSOR_n (batch, head, token); key heads count for keys and values.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel have Triton's types)

import triton
import triton.language as tl

from dynamic_llava.sparsity.kernels.triton_common import load_rows, product, store_rows

ALL, KEPT, DROPPED = (tl.constexpr(which) for which in range(3))
"""Which blocks of the list of keys `keys_kernel` works on."""


@triton.jit
def forward_kernel(
    query, key, value, own, order, presence, kept_before, step, until, out, row_max, row_log_sum,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    tokens, scale,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WITH_BAND: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: an online softmax over its own keys and the list of kept ones."""
    # The last queries see most keys: they start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query += batch * query_b + head.to(tl.int64) * query_h
    key += batch * key_b + (head // GROUPS).to(tl.int64) * key_h
    value += batch * value_b + (head // GROUPS).to(tl.int64) * value_h
    out += batch * out_b + head.to(tl.int64) * out_h
    row_max += (batch * tl.num_programs(1) + head) * tokens
    row_log_sum += (batch * tl.num_programs(1) + head) * tokens
    order += batch * tokens
    presence += batch * tokens
    until += batch * tokens
    rows = start + tl.arange(0, ROWS)
    live = rows < tokens
    row_step = rows
    if WITH_BAND:
        row_step = tl.load(step + batch * tokens + rows, mask=live, other=0)

    q = load_rows(query, rows, query_n, live, SIZE, WIDTH)
    own_key = load_rows(key, rows, key_n, live, SIZE, WIDTH).to(tl.float32)
    own_value = load_rows(value, rows, value_n, live, SIZE, WIDTH).to(tl.float32)
    total = tl.load(own + batch * tokens + rows, mask=live, other=0.0)
    score = tl.sum(q.to(tl.float32) * own_key, 1) * scale
    highest = tl.where(total > 0, score, -float("inf"))
    mean = tl.where(total[:, None] > 0, own_value, 0.0)  # padding may hold anything: 0 * nan is nan
    count = tl.load(kept_before + batch * tokens + tl.minimum(start + ROWS, tokens) - 1)
    for first in range(0, count, KEYS):
        place = first + tl.arange(0, KEYS)
        listed = place < count
        position = tl.load(order + place, mask=listed, other=0)
        present = tl.load(presence + place, mask=listed, other=0.0)
        k = load_rows(key, position, key_n, listed, SIZE, WIDTH)
        scores = product(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32)) * scale
        seen = listed[None, :] & (position[None, :] < rows[:, None])
        present = _present(present, until, position, listed, row_step, WITH_BAND)
        if WITH_BAND:
            seen = seen & (present > 0)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen nothing yet: -inf - -inf must not become NaN.
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(scores - finite[:, None]) * present
        shrink = tl.exp2(highest - finite)
        v = load_rows(value, position, value_n, listed, SIZE, WIDTH)
        mean = product(weight.to(v.dtype), v, mean * shrink[:, None])
        total = total * shrink + tl.sum(weight, 1)
        highest = higher
    sees = total > 0
    mean = mean / tl.where(sees, total, 1.0)[:, None]
    store_rows(out, rows, out_n, live, mean, SIZE, WIDTH)
    tl.store(row_max + rows, tl.where(sees, highest, 0.0), mask=live)
    tl.store(row_log_sum + rows, tl.where(sees, tl.log2(tl.where(sees, total, 1.0)), float("inf")), mask=live)


@triton.jit
def inner_kernel(
    out, grad_out, inner, out_b, out_h, out_n, grad_out_b, grad_out_h, grad_out_n, tokens,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """D_i = <dO_i, O_i> of one block of queries of one head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < tokens
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o = load_rows(out + batch * out_b + head * out_h, rows, out_n, live, SIZE, WIDTH)
    d_o = load_rows(grad_out + batch * grad_out_b + head * grad_out_h, rows, grad_out_n, live, SIZE, WIDTH)
    inner += (batch * tl.num_programs(1) + head) * tokens
    tl.store(inner + rows, tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1), mask=live)


@triton.jit
def queries_kernel(
    query, key, value, own, order, presence, kept_before, step, until,
    grad_out, row_max, row_log_sum, inner, grad_query,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    grad_out_b, grad_out_h, grad_out_n, grad_query_b, grad_query_h, grad_query_n,
    tokens, scale, score_scale,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WITH_BAND: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head: a sum over its own keys and the list of kept ones."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query += batch * query_b + head.to(tl.int64) * query_h
    key += batch * key_b + (head // GROUPS).to(tl.int64) * key_h
    value += batch * value_b + (head // GROUPS).to(tl.int64) * value_h
    grad_out += batch * grad_out_b + head.to(tl.int64) * grad_out_h
    grad_query += batch * grad_query_b + head.to(tl.int64) * grad_query_h
    per_row = (batch * tl.num_programs(1) + head) * tokens
    order += batch * tokens
    presence += batch * tokens
    until += batch * tokens
    rows = start + tl.arange(0, ROWS)
    live = rows < tokens
    row_step = rows
    if WITH_BAND:
        row_step = tl.load(step + batch * tokens + rows, mask=live, other=0)

    q = load_rows(query, rows, query_n, live, SIZE, WIDTH)
    d_o = load_rows(grad_out, rows, grad_out_n, live, SIZE, WIDTH)
    row_inner = tl.load(inner + per_row + rows, mask=live, other=0.0)
    # exp(X - m) / Z in one subtraction; no key of this kernel lies above the maximum.
    row_shift = tl.load(row_max + per_row + rows, mask=live, other=0.0)
    row_shift += tl.load(row_log_sum + per_row + rows, mask=live, other=float("inf"))
    own_key = load_rows(key, rows, key_n, live, SIZE, WIDTH).to(tl.float32)
    own_value = load_rows(value, rows, value_n, live, SIZE, WIDTH).to(tl.float32)
    itself = tl.load(own + batch * tokens + rows, mask=live, other=0.0) > 0
    score = tl.where(itself, tl.sum(q.to(tl.float32) * own_key, 1) * score_scale, -float("inf"))
    d_score = tl.exp2(score - row_shift) * (tl.sum(d_o.to(tl.float32) * own_value, 1) - row_inner)
    d_q = d_score[:, None] * own_key
    count = tl.load(kept_before + batch * tokens + tl.minimum(start + ROWS, tokens) - 1)
    for first in range(0, count, KEYS):
        place = first + tl.arange(0, KEYS)
        listed = place < count
        position = tl.load(order + place, mask=listed, other=0)
        present = tl.load(presence + place, mask=listed, other=0.0)
        k = load_rows(key, position, key_n, listed, SIZE, WIDTH)
        v = load_rows(value, position, value_n, listed, SIZE, WIDTH)
        nothing = tl.zeros([ROWS, KEYS], tl.float32)
        scores = product(q, tl.trans(k), nothing) * score_scale
        seen = listed[None, :] & (position[None, :] < rows[:, None])
        present = _present(present, until, position, listed, row_step, WITH_BAND)
        if WITH_BAND:
            seen = seen & (present > 0)
        weight = tl.where(seen, tl.exp2(scores - row_shift[:, None]) * present, 0.0)
        d_scores = weight * (product(d_o, tl.trans(v), nothing) - row_inner[:, None])
        d_q = product(d_scores.to(k.dtype), k, d_q)
    store_rows(grad_query, rows, grad_query_n, live, d_q * scale, SIZE, WIDTH)


@triton.jit
def keys_kernel(
    query, key, value, own, order, presence, counts, step, until, grad_out, row_max, row_log_sum, inner,
    grad_key, grad_value, grad_keep,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    grad_out_b, grad_out_h, grad_out_n, grad_key_b, grad_key_h, grad_key_n, grad_value_b, grad_value_h, grad_value_n,
    tokens, scale, score_scale, cap,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WITH_BAND: tl.constexpr, WHICH: tl.constexpr, WITH_KEYS: tl.constexpr, WITH_KEEP: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of listed keys, their values, and their share of the keep mask's: over all queries.

    WITH_KEYS: write grad_key and grad_value. WITH_KEEP: write grad_keep (B, K, N), a part per key head. A dropped key
    has a gradient of its own query only, so that blocks of dropped keys need no products for grad_key and grad_value.
    """
    first, key_head, batch = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    kept = tl.load(counts + batch * 2)
    real = tl.load(counts + batch * 2 + 1)
    if (WHICH == KEPT) & (first >= kept):
        return
    if (WHICH == DROPPED) & (first < kept):
        return
    place = first + tl.arange(0, KEYS)
    live = place < tokens
    position = tl.load(order + batch * tokens + place, mask=live, other=0)
    present = tl.load(presence + batch * tokens + place, mask=live, other=0.0)
    itself = tl.load(own + batch * tokens + position, mask=live, other=0.0) > 0
    # Padding follows the real tokens in the list, and nobody sees it.
    past = tl.where(place < real, position, tokens)
    last = past
    if WITH_BAND:
        last = tl.load(until + batch * tokens + position, mask=live, other=-1)
    k = load_rows(key + batch * key_b + key_head.to(tl.int64) * key_h, position, key_n, live, SIZE, WIDTH)
    v = load_rows(value + batch * value_b + key_head.to(tl.int64) * value_h, position, value_n, live, SIZE, WIDTH)
    d_k = tl.zeros([KEYS, WIDTH], tl.float32)
    d_v = tl.zeros([KEYS, WIDTH], tl.float32)
    d_keep = tl.zeros([KEYS], tl.float32)
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        per_row = (batch * tl.num_programs(1) * GROUPS + head) * tokens
        head_query = query + batch * query_b + head.to(tl.int64) * query_h
        head_grad = grad_out + batch * grad_out_b + head.to(tl.int64) * grad_out_h
        if WITH_KEYS:
            q = load_rows(head_query, position, query_n, live, SIZE, WIDTH).to(tl.float32)
            d_o = load_rows(head_grad, position, grad_out_n, live, SIZE, WIDTH).to(tl.float32)
            shift = tl.load(row_max + per_row + position, mask=live, other=0.0)
            shift += tl.load(row_log_sum + per_row + position, mask=live, other=float("inf"))
            score = tl.where(itself, tl.sum(q * k.to(tl.float32), 1) * score_scale, -float("inf"))
            weight = tl.exp2(score - shift)
            row_inner = tl.load(inner + per_row + position, mask=live, other=0.0)
            d_k += (weight * (tl.sum(d_o * v.to(tl.float32), 1) - row_inner))[:, None] * q
            d_v += weight[:, None] * d_o
        if WITH_KEEP or WHICH == KEPT:
            begin = tl.min(past) // ROWS * ROWS
            for start in range(begin, tokens, ROWS):
                rows = start + tl.arange(0, ROWS)
                d_k, d_v, d_keep = _add_rows(
                    d_k, d_v, d_keep, k, v, past, present, last, rows, rows < tokens, step + batch * tokens,
                    head_query, query_n, head_grad, grad_out_n,
                    row_max + per_row, row_log_sum + per_row, inner + per_row, score_scale, cap,
                    SIZE, WIDTH, ROWS, KEYS, WITH_BAND, WITH_KEYS and WHICH == KEPT, WITH_KEEP,
                )  # fmt: skip
    if WITH_KEYS:
        grad_key += batch * grad_key_b + key_head.to(tl.int64) * grad_key_h
        grad_value += batch * grad_value_b + key_head.to(tl.int64) * grad_value_h
        store_rows(grad_key, position, grad_key_n, live, d_k * scale, SIZE, WIDTH)
        store_rows(grad_value, position, grad_value_n, live, d_v, SIZE, WIDTH)
    if WITH_KEEP:
        grad_keep += (batch * tl.num_programs(1) + key_head) * tokens
        tl.store(grad_keep + position, d_keep, mask=place < real)


@triton.jit
def _add_rows(
    d_k, d_v, d_keep, k, v, past, present, last, rows, live, step, query, query_n, grad_out, grad_out_n,
    row_max, row_log_sum, inner, score_scale, cap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WITH_BAND: tl.constexpr, WITH_KEYS: tl.constexpr, WITH_KEEP: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries of one head gives to the gradients of one block of keys of its past."""
    q = load_rows(query, rows, query_n, live, SIZE, WIDTH)
    d_o = load_rows(grad_out, rows, grad_out_n, live, SIZE, WIDTH)
    highest = tl.load(row_max + rows, mask=live, other=0.0)
    log_sum = tl.load(row_log_sum + rows, mask=live, other=float("inf"))
    row_inner = tl.load(inner + rows, mask=live, other=0.0)
    nothing = tl.zeros([KEYS, ROWS], tl.float32)
    scores = product(k, tl.trans(q), nothing) * score_scale
    # A dropped key may lie above the maximum over the kept ones.
    weight = tl.exp2(tl.minimum(scores - highest[None, :], cap) - log_sum[None, :])
    weight = tl.where(past[:, None] < rows[None, :], weight, 0.0)
    change = weight * (product(v, tl.trans(d_o), nothing) - row_inner[None, :])
    decided = change
    present = present[:, None]
    if WITH_BAND:
        inside = last[:, None] >= tl.load(step + rows, mask=live, other=0)[None, :]
        decided = tl.where(inside, 0.0, change)
        present = tl.where(inside, 1.0, present)
    if WITH_KEEP:
        d_keep += tl.sum(decided, 1)
    if WITH_KEYS:
        # At a dropped key `change` may overflow: 0 * inf must not become NaN.
        kept = present > 0
        d_v = product(tl.where(kept, weight * present, 0.0).to(d_o.dtype), d_o, d_v)
        d_k = product(tl.where(kept, change * present, 0.0).to(q.dtype), q, d_k)
    return d_k, d_v, d_keep


@triton.jit
def _present(present, until, position, listed, row_step, WITH_BAND: tl.constexpr):
    """Return M of a block of listed keys, (1, KEYS), or G, (ROWS, KEYS), which is 1 for queries in a key's band."""
    if WITH_BAND:
        last = tl.load(until + position, mask=listed, other=-1)
        return tl.where(last[None, :] >= row_step[:, None], 1.0, present[None, :])
    else:
        return present[None, :]
