"""What the Triton kernels share. Triton decides at import whether its interpreter or a GPU runs a kernel.

Shape suffixes: R block rows, E padded head size (to a power of two).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (the arguments of a kernel have Triton's types)

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set when the kernels were defined: they run on CPU tensors, in Python, for tests."""
WIDEN = tl.constexpr(INTERPRETED)
LOG2_E = 1.4426950408889634
"""Exponentials are taken to base 2, which is what the hardware computes; scores are scaled by this."""


@triton.jit
def load_rows(pointer, index, stride, live, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows `index` of SIZE entries, 0 beyond the size and where not live; returns (R, E)."""
    column = tl.arange(0, WIDTH)
    mask = live[:, None]
    if SIZE != WIDTH:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(pointer + index[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, index, stride, live, rows, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Store (R, E) into rows `index` of SIZE entries, where live."""
    column = tl.arange(0, WIDTH)
    mask = live[:, None]
    if SIZE != WIDTH:
        mask = mask & (column < SIZE)[None, :]
    tl.store(pointer + index[:, None] * stride + column[None, :], rows.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, total):
    """Return total + a @ b in float32; factors of float32 are multiplied exactly, not in TensorFloat-32."""
    if WIDEN:
        # The interpreter holds bfloat16 as integers; every product of two bfloat16 is exact in float32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def padded(size: int) -> int:
    """Return the head size padded to what a matrix product needs: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def with_dense_rows(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 4 for the CPU, where only the interpreter runs."""
    if device.type == "cpu":
        return 4
    return int(torch.get_device_module(device).get_device_properties(device).multi_processor_count)
