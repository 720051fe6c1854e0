"""What the tests of MaskedSoftmax's implementations share; Eq. 7 and random inputs for it are the profiler's laws'."""

import pytest
import torch

from dynamic_llava.profile.laws import NAMES, assert_equal, dominated, equation_7, make, padding, results
from dynamic_llava.sparsity import masked_softmax_attention
from tests.sparsity.implementations import device_of, moved, with_triton

__all__ = ["NAMES", "assert_equal", "dominated", "equation_7", "make", "padding", "results"]
IMPLEMENTATIONS = with_triton("reference", "chunked")
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def dtypes(implementation):
    """What an implementation computes in, besides half types."""
    return [torch.float32] if implementation == "triton" else [torch.float32, torch.float64]


def set_tiles(monkeypatch, rows, keys):
    from dynamic_llava.sparsity.kernels import triton_attention

    blocks = triton_attention.Blocks(rows, keys, warps=4, stages=2)
    monkeypatch.setattr(triton_attention, "blocks_of", lambda *_: blocks)


def attention(implementation, **arguments):
    """The function under test; inputs may lie on the CPU, where its result lies too."""
    device, arguments = device_of(implementation), moved(arguments, implementation)

    def run(*inputs):
        inputs = (tensor.to(device) for tensor in inputs)
        return masked_softmax_attention(*inputs, implementation=implementation, **arguments).cpu()

    return run
