"""What only a GPU can show: the kernels' laws on it, their speed beside FlashAttention-2, and a replayed graph.

The laws are the profiler's, which its benchmark runs where there is no test runner. On a machine with a GPU every test
of both operations also runs `triton` there.
"""

import pytest
import torch

from dynamic_llava.profile.laws import kernel_laws
from dynamic_llava.profile.operations import attention_rows
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from tests.sparsity.implementations import HAS_GPU

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]
LAWS = kernel_laws(torch.device("cuda")) if HAS_GPU else {"every law of kernel_laws": None}


@pytest.mark.parametrize("name", LAWS)
def test_laws_on_the_gpu(name):
    LAWS[name]()


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_takes_at_most_1_6_times_the_time_of_flash_attention(tokens, keep):
    sizes = {"tokens": tokens, "keep_rate": keep, "heads": 32, "width": 128, "rounds": 10, "calls": 5}
    (row,) = attention_rows(("triton",), torch.device("cuda"), torch.bfloat16, **sizes)
    print(row, torch.cuda.get_device_name())
    assert row["ratio"] <= 1.6


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
