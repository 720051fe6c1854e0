"""What only a GPU can show: speed and memory beside FlashAttention-2, and decoding from a replayed graph.

The laws need no file of their own: on a machine with a GPU every test of both operations also runs `triton` there.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from tests.sparsity.implementations import HAS_GPU

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]


def both_passes(tokens, keep, heads=32, size=128):
    """Functions that run forward and backward in bfloat16: MaskedSoftmax, and FlashAttention-2 without a mask."""
    shape = (1, heads, tokens, size)
    *qkv, upstream = torch.randn(4, *shape, device="cuda", dtype=torch.bfloat16)
    mask = (torch.rand(1, tokens, device="cuda") < keep).float().requires_grad_()
    qkv = [tensor.requires_grad_() for tensor in qkv]

    def masked():
        output = masked_softmax_attention(*qkv, mask, implementation="triton")
        torch.autograd.grad(output, (*qkv, mask), upstream)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.autograd.grad(F.scaled_dot_product_attention(*qkv, is_causal=True), qkv, upstream)

    return masked, flash


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_takes_at_most_1_6_times_the_time_of_flash_attention(tokens, keep):
    from triton.testing import do_bench

    masked, flash = (do_bench(function, return_mode="median") for function in both_passes(tokens, keep))
    print(f"{tokens} tokens, {keep} kept, {torch.cuda.get_device_name()}: {masked:.3f} ms, flash {flash:.3f} ms")
    assert masked <= 1.6 * flash


def peak(function):
    function()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_linear_in_the_length():
    short, long = (peak(both_passes(tokens, 0.3)[0]) for tokens in (2048, 8192))
    assert long <= 4.2 * short


def test_a_replayed_graph_follows_the_lengths():
    query = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, 2, 8, 640, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([3, 100], device="cuda")
    with torch.no_grad():
        ragged_attention(query, keys, values, lengths, implementation="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ragged_attention(query, keys, values, lengths, implementation="triton")
        lengths.add_(400)
        graph.replay()
        expected = ragged_attention(query, keys, values, lengths, implementation="sdpa")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
