"""What MaskedSoftmax attention keeps for its backward pass, the largest tensor it ever makes, and how fast it is."""

import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.kernels.chunked import BLOCK_ROWS

HEADS, SIZE = 4, 64


def make(tokens, heads=HEADS, key_heads=HEADS):
    query = torch.randn(1, heads, tokens, SIZE, requires_grad=True)
    key, value = (torch.randn(1, key_heads, tokens, SIZE, requires_grad=True) for _ in range(2))
    mask = (torch.rand(1, tokens) < 0.3).float().requires_grad_()
    return query, key, value, mask


def saved_bytes(function):
    """Bytes of the distinct storages that autograd saves while `function` runs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(storages.values())


def saved_by(implementation, tokens):
    inputs = make(tokens)
    padding_mask = torch.arange(tokens)[None] >= 3
    return saved_bytes(
        lambda: masked_softmax_attention(*inputs, padding_mask=padding_mask, implementation=implementation)
    )


def test_saved_memory_is_linear_in_the_length():
    lengths = [128, 256, 512, 1024, 2048]
    saved = [saved_by("chunked", tokens) for tokens in lengths]
    per_token = [amount / tokens for amount, tokens in zip(saved, lengths, strict=True)]
    assert max(per_token) / min(per_token) < 1.01
    assert saved_by("reference", 1024) > 3.5 * saved_by("reference", 512)


@pytest.mark.parametrize("tokens", [127, 512, 1024])
def test_saves_hardly_more_than_scaled_dot_product_attention(tokens):
    query, key, value, _ = make(tokens)
    plain = saved_bytes(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    assert saved_by("chunked", tokens) <= 1.05 * plain


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensor(implementation, tokens):
    inputs = make(tokens, key_heads=2)
    with LargestTensor() as largest:
        masked_softmax_attention(*inputs, implementation=implementation).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)
    return largest.elements


def test_no_tensor_of_n_by_n_exists_in_either_pass():
    for tokens in (512, 1000):
        assert largest_tensor("chunked", tokens) <= HEADS * BLOCK_ROWS * tokens
        assert largest_tensor("reference", tokens) == HEADS * tokens**2


def seconds(function, repeats=3):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_chunked_is_at_least_two_and_a_half_times_faster():
    inputs = make(2048, heads=8, key_heads=8)
    upstream = torch.randn_like(inputs[0])

    def run(implementation):
        output = masked_softmax_attention(*inputs, implementation=implementation)
        torch.autograd.grad(output, inputs, upstream)

    times = {name: seconds(lambda name=name: run(name)) for name in ("reference", "chunked")}
    print(times)
    assert times["reference"] > 2.5 * times["chunked"]
