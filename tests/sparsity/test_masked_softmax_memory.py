"""What MaskedSoftmax attention keeps for its backward pass, the memory it takes for a while, and how fast it is."""

import time
from itertools import accumulate

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.kernels.chunked import BLOCK_ROWS
from tests.sparsity.implementations import RUNS_TRITON

HEADS, SIZE = 4, 64
# Triton's interpreter takes its time per tile.
fused = pytest.mark.parametrize(
    ("implementation", "lengths"),
    [("chunked", [127, 256, 512, 1024, 2048])] + ([("triton", [96, 128, 200])] if RUNS_TRITON else []),
)


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


@fused
def test_saved_memory_is_linear_in_the_length(implementation, lengths):
    saved = [saved_by(implementation, tokens) for tokens in lengths]
    per_token = [amount / tokens for amount, tokens in zip(saved, lengths, strict=True)]
    assert max(per_token) / min(per_token) < 1.01
    assert saved_by("reference", 1024) > 3.5 * saved_by("reference", 512)


@fused
def test_saves_hardly_more_than_scaled_dot_product_attention(implementation, lengths):
    for tokens in lengths[:4]:
        query, key, value, _ = make(tokens)
        plain = saved_bytes(lambda qkv=(query, key, value): F.scaled_dot_product_attention(*qkv, is_causal=True))
        assert saved_by(implementation, tokens) <= 1.05 * plain


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
        assert largest_tensor("chunked", tokens) <= HEADS * max(BLOCK_ROWS, SIZE) * tokens
        assert largest_tensor("reference", tokens) == HEADS * tokens**2


def both_passes(implementation, tokens):
    """Functions that run forward and backward of an implementation and of plain causal attention; 8 heads of 64."""
    *qkv, mask = make(tokens, heads=8, key_heads=8)
    upstream = torch.randn_like(qkv[0])

    def masked():
        output = masked_softmax_attention(*qkv, mask, implementation=implementation)
        return torch.autograd.grad(output, (*qkv, mask), upstream)

    def plain():
        return torch.autograd.grad(F.scaled_dot_product_attention(*qkv, is_causal=True), qkv, upstream)

    return masked, plain


def peak_bytes(function):
    """The most memory that is allocated at one time while `function` runs, what it returns included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        returned = function()
    del returned
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_takes_at_most_twice_the_memory_of_plain_attention_for_a_while():
    for tokens in (512, 2048):
        masked, plain = both_passes("chunked", tokens)
        assert peak_bytes(masked) <= 2 * peak_bytes(plain)
    *qkv, mask = make(2048, heads=8, key_heads=8)
    forward = peak_bytes(lambda: masked_softmax_attention(*qkv, mask, implementation="chunked"))
    assert forward <= 2 * peak_bytes(lambda: F.scaled_dot_product_attention(*qkv, is_causal=True))


def interleaved_seconds(*functions, repeats=5):
    """The fastest time of each function, run in turns so that noise meets all of them."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, collected in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            collected.append(time.perf_counter() - start)
    return [min(collected[1:]) for collected in times]


@pytest.mark.slow
def test_chunked_is_much_faster_than_the_definition_and_near_to_plain_attention():
    chunked, plain = both_passes("chunked", 2048)
    reference, _ = both_passes("reference", 2048)
    near = interleaved_seconds(chunked, plain, repeats=7)
    far = interleaved_seconds(chunked, reference, repeats=2)
    print({"chunked, plain": near, "chunked, reference": far})
    assert near[0] < 4 * near[1]
    assert far[1] > 2.5 * far[0]
