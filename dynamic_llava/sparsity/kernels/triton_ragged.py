"""Triton kernels of `ragged_attention`: one new token per row over a cache filled to different lengths.

The slots are cut into splits, each the work of one program per row and key head, so that a single row keeps the whole
GPU busy; a second kernel combines them. The number of splits follows from shapes and device, never from lengths:
nothing is read on the host, and a replayed graph stays right. A program reads no slot behind the length of its row, or
of its key head where heads have lengths of their own.
Shape suffixes: B rows, H query heads, K key heads, G query heads per key head, W slots, Z splits of them, d head size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel have Triton's types)

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from dynamic_llava.sparsity.kernels.triton_common import (
    LOG2_E,
    load_rows,
    padded,
    processors,
    product,
    store_rows,
    with_dense_rows,
)

SLOTS = {2: 64, 4: 32}
"""Slots per iteration, by bytes of a number: 16 KiB of keys of size 128, a few of which are in flight."""
WARPS, STAGES = 4, 3
PROGRAMS_PER_PROCESSOR = 2
"""Enough loads in flight to saturate the memory, few enough that combining stays negligible."""


@triton.jit(do_not_specialize=["slots_each", "splits"])
def split_kernel(
    query, keys, values, lengths, mean, highest, total,
    query_b, query_h, keys_b, keys_h, keys_w, values_b, values_h, values_w, lengths_b, lengths_h,
    slots_each, splits, scale,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One split of the slots of one row, for the query heads of one key head: (mean, highest score, sum of weights)."""
    split, key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys += row * keys_b + key_head * keys_h
    values += row * values_b + key_head * values_h
    heads = tl.arange(0, GROUPS_PADDED)
    live = heads < GROUPS
    q = load_rows(query + row * query_b + key_head * GROUPS * query_h, heads, query_h, live, SIZE, WIDTH)
    begin = split * slots_each
    end = tl.minimum(begin + slots_each, (tl.load(lengths + row * lengths_b + key_head * lengths_h) + 1).to(tl.int32))
    top = tl.full([GROUPS_PADDED], -float("inf"), tl.float32)
    weights = tl.zeros([GROUPS_PADDED], tl.float32)
    sums = tl.zeros([GROUPS_PADDED, WIDTH], tl.float32)
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        filled = slot < end
        k = load_rows(keys, slot, keys_w, filled, SIZE, WIDTH)
        scores = product(q, tl.trans(k), tl.zeros([GROUPS_PADDED, SLOTS], tl.float32)) * scale
        scores = tl.where(filled[None, :], scores, -float("inf"))
        # The first slot of every iteration is filled, so that the maximum is finite.
        higher = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        v = load_rows(values, slot, values_w, filled, SIZE, WIDTH)
        sums = product(weight.to(v.dtype), v, sums * shrink[:, None])
        weights = weights * shrink + tl.sum(weight, 1)
        top = higher
    place = ((row * tl.num_programs(1) + key_head) * splits + split) * GROUPS
    store_rows(mean + place * SIZE, heads, SIZE, live, sums / tl.maximum(weights, 1.0)[:, None], SIZE, WIDTH)
    tl.store(highest + place + heads, top, mask=live)
    tl.store(total + place + heads, weights, mask=live)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    mean, highest, total, out, out_b, out_h, splits,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One query head of one row: its splits, weighted by their sums. The first split always holds a slot."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_heads = tl.num_programs(0) // GROUPS
    place = (row * key_heads + head // GROUPS) * splits * GROUPS + head % GROUPS
    column = tl.arange(0, WIDTH)
    inside = column < SIZE
    top = tl.load(highest + place)
    weights = tl.load(total + place)
    sums = weights * tl.load(mean + place * SIZE + column, mask=inside, other=0.0)
    for split in range(1, splits):
        at = place + split * GROUPS
        score = tl.load(highest + at)
        higher = tl.maximum(top, score)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher) * tl.load(total + at)
        sums = sums * shrink + weight * tl.load(mean + at * SIZE + column, mask=inside, other=0.0)
        weights = weights * shrink + weight
        top = higher
    out += row * out_b + head.to(tl.int64) * out_h
    tl.store(out + column, (sums / weights).to(out.dtype.element_ty), mask=inside)


def ragged_decode(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Return what `ragged_attention` returns, whose checked arguments these are. ValueError where gradients flow."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values)):
        raise ValueError(
            "the triton implementation of ragged_attention has no gradient; call it in torch.no_grad() or "
            "torch.inference_mode(), or use implementation='sdpa'"
        )
    return _ragged_decode(query, keys, values, lengths, scale)


@library.custom_op("dynamic_llava::ragged_decode", mutates_args=())
def _ragged_decode(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """One opaque operation for torch.compile, so that its graph holds no trace of shapes that the kernels ignore."""
    query, keys, values = (with_dense_rows(x) for x in (query, keys, values))
    lengths = lengths[:, None].expand(-1, keys.shape[1]) if lengths.dim() == 1 else lengths
    batch, heads, _, size = query.shape
    key_heads, slots = keys.shape[1:3]
    groups = heads // key_heads
    block = SLOTS[query.element_size()]
    splits, slots_each = split_slots(batch * key_heads, slots, block, processors(query.device))
    mean = query.new_empty((batch, key_heads, splits, groups, size), dtype=torch.float32)
    highest, total = (mean.new_empty(mean.shape[:-1]) for _ in range(2))
    out = query.new_empty(query.shape)
    split_kernel[(splits, key_heads, batch)](
        query, keys, values, lengths, mean, highest, total, *query.stride()[:2], *keys.stride()[:3],
        *values.stride()[:3], *lengths.stride()[:2], slots_each, splits, scale * LOG2_E,
        GROUPS=groups, GROUPS_PADDED=padded(groups), SIZE=size, WIDTH=padded(size), SLOTS=block,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    combine_kernel[(heads, batch)](
        mean, highest, total, out, *out.stride()[:2], splits, GROUPS=groups, SIZE=size, WIDTH=padded(size), num_warps=1
    )
    return out


@_ragged_decode.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def split_slots(programs: int, slots: int, block: int, processors: int) -> tuple[int, int]:
    """Return (splits, slots of each): enough splits for the device, each a whole number of iterations.

    programs: rows times key heads, which run side by side anyway; block: slots per iteration.
    """
    iterations = -(-slots // block)
    wanted = -(-processors * PROGRAMS_PER_PROCESSOR // programs)
    each = -(-iterations // min(wanted, iterations))
    return -(-iterations // each), each * block
