"""MaskedSoftmax attention on NVIDIA GPUs: launches the kernels of triton_masked.py, forward and backward.

Saved for the backward pass are the inputs, the output and two numbers per query, as in FlashAttention. Nothing is read
on the host: how many keys are kept is known to the kernels only.
Shape suffixes: B rows, H query heads, K key heads, N tokens, d head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamic_llava.sparsity.kernels import EXPONENT_CAP
from dynamic_llava.sparsity.kernels.triton_common import LOG2_E, padded, with_dense_rows
from dynamic_llava.sparsity.kernels.triton_masked import (
    ALL,
    DROPPED,
    KEPT,
    forward_kernel,
    inner_kernel,
    keys_kernel,
    queries_kernel,
)
from dynamic_llava.sparsity.window import NEVER, Band


class Blocks(NamedTuple):
    """The shape of one kernel's work: queries and keys of a tile, warps, and loads in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


BLOCKS: dict[tuple[str, int, int], Blocks] = {
    # (kernel, bytes of a number, largest head size). What a program holds through its loop is long, what streams by is
    # short. The limits are registers and shared memory, as compiled for compute capability 8.0 and 9.0.
    ("forward", 2, 64): Blocks(rows=128, keys=64, warps=4, stages=3),
    ("forward", 2, 128): Blocks(rows=128, keys=64, warps=8, stages=3),
    ("queries", 2, 64): Blocks(rows=128, keys=64, warps=8, stages=3),
    ("queries", 2, 128): Blocks(rows=128, keys=64, warps=8, stages=2),
    ("keys", 2, 64): Blocks(rows=64, keys=128, warps=8, stages=3),
    ("keys", 2, 128): Blocks(rows=32, keys=128, warps=8, stages=2),  # two accumulators: 64 rows would spill
    # float32 is multiplied exactly, outside the tensor cores, and operands wait in registers: small tiles.
    ("forward", 4, 64): Blocks(rows=64, keys=32, warps=8, stages=2),
    ("forward", 4, 128): Blocks(rows=32, keys=32, warps=8, stages=2),
    ("queries", 4, 64): Blocks(rows=32, keys=32, warps=4, stages=2),
    ("queries", 4, 128): Blocks(rows=32, keys=32, warps=4, stages=2),
    ("keys", 4, 64): Blocks(rows=32, keys=32, warps=4, stages=2),
    ("keys", 4, 128): Blocks(rows=16, keys=32, warps=8, stages=2),
}
BANDED = {("forward", 2, 64): Blocks(rows=128, keys=64, warps=8, stages=3)}
"""With a band: its two integers per key and one per query are more than 4 warps have registers for."""


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_mask: Tensor,
    padding_mask: Tensor | None,
    band: Band | None,
    scale: float,
) -> Tensor:
    """Return MaskedSoftmax attention as `masked_softmax_attention` defines it, whose checked arguments these are."""
    keep_BN = keep_mask.float()
    own_BN = torch.ones_like(keep_BN, requires_grad=False)
    if padding_mask is not None:
        own_BN = padding_mask.float()
        keep_BN = torch.where(padding_mask, keep_BN, 0.0)
    query, key, value = (with_dense_rows(x) for x in (query, key, value))
    keys = KeyList.of(keep_BN.detach(), own_BN, band)
    return cast(Callable[..., Tensor], _TritonAttention.apply)(query, key, value, keep_BN, own_BN, scale, *keys)


def blocks_of(kernel: str, dtype: torch.dtype, head_size: int, banded: bool) -> Blocks:
    """Return the tile of a kernel ("forward", "queries", "keys") for a dtype and a head size up to 128."""
    kind = kernel, dtype.itemsize, 64 if head_size <= 64 else 128
    return BANDED.get(kind, BLOCKS[kind]) if banded else BLOCKS[kind]


class KeyList(NamedTuple):
    """The keys of every row of the batch, in the order the kernels read them: kept, dropped, padding.

    Dropped keys that have a band stand among the kept ones, for some queries see them.
    """

    order: Tensor
    """(B, N) int32: positions."""
    presence: Tensor
    """(B, N) float32: the keep mask in that order."""
    kept_before: Tensor
    """(B, N) int32: kept keys before each position, so that a block of queries knows where its past ends."""
    counts: Tensor
    """(B, 2) int32: kept keys, and real (not padding) keys."""
    step: Tensor | None
    """(B, N) int32: the band's step at each position; None without a band."""
    until: Tensor | None
    """(B, N) int32: the band's until at each position."""

    @classmethod
    def of(cls, keep_BN: Tensor, own_BN: Tensor, band: Band | None) -> "KeyList":
        """Sort the keys of keep mask and padding, both (B, N) float; a few operations of size N, on the device."""
        kept_BN, real_BN = keep_BN > 0, own_BN > 0
        step = until = None
        if band is not None:
            band = band.real(real_BN)
            kept_BN = kept_BN | (band.until != NEVER)
            step, until = band.step.int(), band.until.int()
        kind_BN = torch.where(kept_BN, 0, torch.where(real_BN, 1, 2)).to(torch.uint8)
        order_BN = kind_BN.argsort(dim=1, stable=True)
        kept_before = kept_BN.cumsum(1) - kept_BN.long()
        counts = torch.stack([kept_BN.sum(1), real_BN.sum(1)], dim=1)
        return cls(order_BN.int(), keep_BN.gather(1, order_BN), kept_before.int(), counts.int(), step, until)

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """The kernels' arguments `step` and `until`; without a band any integers, which are not read."""
        return (self.order, self.order) if self.step is None or self.until is None else (self.step, self.until)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep_BN: Tensor,
        own_BN: Tensor,
        scale: float,
        *listed: Tensor | None,
    ) -> Tensor:
        keys = KeyList(*listed)  # type: ignore[arg-type]
        out = with_dense_rows(torch.empty_like(query))
        row_max, row_log_sum = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
        batch, heads, tokens, size = query.shape
        blocks = blocks_of("forward", query.dtype, size, keys.step is not None)
        forward_kernel[(-(-tokens // blocks.rows), heads, batch)](
            query, key, value, own_BN, keys.order, keys.presence, keys.kept_before, *keys.band,
            out, row_max, row_log_sum,
            *_strides(query, key, value, out), tokens, scale * LOG2_E, **_sizes(query, keys, key, blocks),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, own_BN, *keys, out, row_max, row_log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_BN, order, presence, kept_before, counts, step, until, *rest = ctx.saved_tensors
        keys = KeyList(order, presence, kept_before, counts, step, until)
        for_query, for_key, for_value, for_keep = ctx.needs_input_grad[:4]
        gradients = _Backward(ctx.scale, query, key, value, own_BN, keys, with_dense_rows(grad_out), *rest)
        d_query = gradients.of_queries() if for_query else None
        d_key, d_value, d_keep = gradients.of_keys(for_key or for_value, for_keep)
        return d_query, d_key if for_key else None, d_value if for_value else None, d_keep, *(None,) * 8


class _Backward:
    """What the kernels of the backward pass share; `of_queries` and `of_keys` launch them."""

    def __init__(
        self,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_BN: Tensor,
        keys: KeyList,
        grad_out: Tensor,
        out: Tensor,
        row_max: Tensor,
        row_log_sum: Tensor,
    ) -> None:
        self.scale, self.query, self.key, self.value, self.own_BN = scale, query, key, value, own_BN
        self.keys, self.grad_out = keys, grad_out
        inner = torch.empty_like(row_max)
        batch, heads, tokens, size = query.shape
        inner_kernel[(-(-tokens // INNER_ROWS), heads, batch)](
            out, grad_out, inner, *_strides(out, grad_out), tokens, SIZE=size, WIDTH=padded(size), ROWS=INNER_ROWS
        )
        self.per_row = (row_max, row_log_sum, inner)

    def of_queries(self) -> Tensor:
        """Return the gradient of the query (B, H, N, d)."""
        query, keys = self.query, self.keys
        d_query = with_dense_rows(torch.empty_like(query))
        batch, heads, tokens, size = query.shape
        blocks = blocks_of("queries", query.dtype, size, keys.step is not None)
        queries_kernel[(-(-tokens // blocks.rows), heads, batch)](
            query, self.key, self.value, self.own_BN, keys.order, keys.presence, keys.kept_before, *keys.band,
            self.grad_out, *self.per_row, d_query,
            *_strides(query, self.key, self.value, self.grad_out, d_query),
            tokens, self.scale, self.scale * LOG2_E, **_sizes(query, keys, self.key, blocks),
        )  # fmt: skip
        return d_query

    def of_keys(self, with_keys: bool, with_keep: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of key and value (B, K, N, d) and of the keep mask (B, N) float32, those asked for."""
        query, key, value, keys = self.query, self.key, self.value, self.keys
        batch, key_heads, tokens, size = key.shape
        d_key, d_value = (with_dense_rows(torch.empty_like(x)) if with_keys else x for x in (key, value))
        d_keep = self.own_BN.new_zeros((batch, key_heads, tokens) if with_keep else ())
        blocks = blocks_of("keys", query.dtype, size, keys.step is not None)
        for which in (KEPT, DROPPED) if with_keys else (ALL,) if with_keep else ():
            keys_kernel[(-(-tokens // blocks.keys), key_heads, batch)](
                query, key, value, self.own_BN, keys.order, keys.presence, keys.counts, *keys.band,
                self.grad_out, *self.per_row, d_key, d_value, d_keep,
                *_strides(query, key, value, self.grad_out, d_key, d_value),
                tokens, self.scale, self.scale * LOG2_E, EXPONENT_CAP * LOG2_E, **_sizes(query, keys, key, blocks),
                WHICH=which, WITH_KEYS=with_keys, WITH_KEEP=with_keep,
            )  # fmt: skip
        # One owner per key head: the sum over heads has a fixed order.
        return *((d_key, d_value) if with_keys else (None, None)), d_keep.sum(1) if with_keep else None


INNER_ROWS = 64
"""Rows per program of the kernel that only reads: <dO, O>."""


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and token of every tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _sizes(query: Tensor, keys: KeyList, key: Tensor, blocks: Blocks) -> dict[str, Any]:
    """Return the arguments that a kernel is compiled for."""
    size = query.shape[3]
    return {
        "GROUPS": query.shape[1] // key.shape[1], "SIZE": size, "WIDTH": padded(size),
        "ROWS": blocks.rows, "KEYS": blocks.keys, "WITH_BAND": keys.step is not None,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip
