"""What MaskedSoftmax computes for the gradients somebody needs, for any strides, in any tile, and in which order."""

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava.sparsity.kernels import chunked
from tests.sparsity.equation_7 import (
    IMPLEMENTATIONS,
    assert_equal,
    attention,
    equation_7,
    every,
    make,
    padding,
    results,
    set_tiles,
)


@pytest.mark.parametrize("needed", [needed for needed in product((False, True), repeat=4) if any(needed)], ids=str)
@every
def test_every_choice_of_gradients(implementation, needed):
    """Frozen projections, predictors alone, scoring: what is computed is the same, whatever else is left out."""
    inputs, upstream = make(batch=1, heads=2, key_heads=1, tokens=40)
    expected = results(attention(implementation), inputs, upstream, torch.float32)[1:]
    leaves = [tensor.float().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    actual = torch.autograd.grad(attention(implementation)(*leaves), wanted, upstream.float())
    for gradient, wanted_too in zip(actual, (x for x, need in zip(expected, needed, strict=True) if need), strict=True):
        torch.testing.assert_close(gradient.double(), wanted_too, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("needed", "products"), [("qkvm", 5), ("qkv", 5), ("m", 2), ("v", 1 + 1), ("k", 3), ("q", 3), ("qm", 3)]
)
def test_chunked_multiplies_only_what_is_needed(needed, products):
    """Scores again, then one product each for dP and for every gradient; the mask gradient is a sum over dP's."""
    inputs, upstream = make(batch=1, tokens=2 * chunked.BLOCK_ROWS, size=8)
    leaves = [tensor.requires_grad_(name in needed) for tensor, name in zip(inputs, "qkvm", strict=True)]
    output = attention("chunked")(*leaves)
    with FlopCounterMode(display=False) as counted:
        output.backward(upstream)
    blocks = 1 + 2
    assert counted.get_total_flops() == products * blocks * 2 * 4 * chunked.BLOCK_ROWS**2 * 8


@every
def test_repeats_bit_by_bit(implementation):
    inputs, upstream = make(heads=2, key_heads=1, tokens=100)
    first, second = (results(attention(implementation), inputs, upstream, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="triton cannot run in this process")
@pytest.mark.parametrize(("rows", "keys"), [(16, 64), (64, 16), (128, 128)])
def test_triton_gives_the_same_whatever_its_tile(monkeypatch, rows, keys):
    inputs, upstream = make(batch=2, heads=2, key_heads=1, tokens=70)
    set_tiles(monkeypatch, rows, keys)
    side = padding(2, 70, "left")
    expected = results(lambda *x: equation_7(*x, padding_mask=side), inputs, upstream)
    assert_equal(results(attention("triton", padding_mask=side), inputs, upstream, torch.float32), expected, 2e-5)


@every
def test_checkpointing_changes_nothing(implementation):
    inputs, upstream = make(batch=1, heads=2, key_heads=1, tokens=40)
    function = attention(implementation)
    kept = results(function, inputs, upstream, torch.float32)
    recomputed = results(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs, upstream, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@every
def test_any_strides_and_head_size(implementation):
    """Heads behind tokens, as a projection leaves them; a gradient that is one number, expanded; 80 numbers a head."""
    query = torch.randn(1, 45, 4, 80).transpose(1, 2)
    key, value = torch.randn(2, 1, 45, 2, 80).transpose(2, 3)
    mask = (torch.rand(1, 45) < 0.5).float()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, mask)]
    output = attention(implementation)(*leaves)
    gradients = torch.autograd.grad(output.sum(), leaves)
    inputs = [tensor.detach().double().contiguous() for tensor in leaves]
    expected = results(equation_7, inputs, torch.ones(1, 4, 45, 80, dtype=torch.float64))
    assert_equal([output.detach(), *gradients], expected, 2e-5)
