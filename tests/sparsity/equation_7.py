"""Eq. 7 as it is written, random inputs for it, and what the tests of its implementations share.

Shape suffixes: B batch, H query heads, K key heads, N tokens, D head size.
"""

import pytest
import torch

from dynamic_llava.sparsity import masked_softmax_attention
from tests.sparsity.implementations import device_of, moved, with_triton

IMPLEMENTATIONS = with_triton("reference", "chunked")
NAMES = ("output", "query gradient", "key gradient", "value gradient", "mask gradient")
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def dtypes(implementation):
    """What an implementation computes in, besides half types."""
    return [torch.float32] if implementation == "triton" else [torch.float32, torch.float64]


def set_tiles(monkeypatch, rows, keys):
    from dynamic_llava.sparsity.kernels import triton_attention

    blocks = triton_attention.Blocks(rows, keys, warps=4, stages=2)
    monkeypatch.setattr(triton_attention, "blocks_of", lambda *_: blocks)


def equation_7(query, key, value, keep_mask, padding_mask=None, scale=None):
    """Eq. 7 as it is written, without any stabilisation; float64 holds exp(700)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    tokens = query.shape[2]
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    itself = torch.eye(tokens, dtype=torch.bool)
    gates = torch.where(itself, 1.0, keep_mask[:, None, None, :].to(scores.dtype))
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if padding_mask is not None:
        visible = visible & padding_mask[:, None, None, :]
    numerator = (scores.exp() * gates).masked_fill(~visible, 0)
    total = numerator.sum(-1, keepdim=True)
    return (numerator / total.masked_fill(total == 0, torch.inf)) @ value


def make(batch=2, heads=4, key_heads=4, tokens=63, size=16, spread=1.5, keep=0.5):
    """Random float64 inputs (query, key, value, keep mask) and an upstream gradient."""
    query, upstream = torch.randn(2, batch, heads, tokens, size, dtype=torch.float64).mul(spread)
    key, value = torch.randn(2, batch, key_heads, tokens, size, dtype=torch.float64).mul(spread)
    mask = (torch.rand(batch, tokens) < keep).double()
    return (query, key, value, mask), upstream


def results(function, inputs, upstream, dtype=torch.float64, mask_dtype=None):
    """Return output and gradients as float64."""
    *qkv, mask = inputs
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in qkv]
    leaves.append(mask.to(mask_dtype or dtype).clone().requires_grad_())
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    return [output.detach().double(), *(gradient.double() for gradient in gradients)]


def attention(implementation, **arguments):
    """The function under test; inputs may lie on the CPU, where its result lies too."""
    device, arguments = device_of(implementation), moved(arguments, implementation)

    def run(*inputs):
        inputs = (tensor.to(device) for tensor in inputs)
        return masked_softmax_attention(*inputs, implementation=implementation, **arguments).cpu()

    return run


def assert_equal(actual, expected, tolerance, names=NAMES):
    """Largest difference of each tensor, relative to its largest entry (or to 0.1, where the true gradient is 0)."""
    for name, a, b in zip(names, actual, expected, strict=True):
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = ((a - b).abs().max() / b.abs().max().clamp(min=0.1)).item()
        assert error <= tolerance, f"{name}: {error:.2e} of its scale"


def padding(batch, tokens, side):
    """The first row stays whole, the others lose a growing share on the given side; None is no padding."""
    if side is None:
        return None
    length = torch.tensor([tokens - row * (tokens // (batch + 1)) for row in range(batch)])
    place = torch.arange(tokens)
    return place < length[:, None] if side == "right" else place >= tokens - length[:, None]
