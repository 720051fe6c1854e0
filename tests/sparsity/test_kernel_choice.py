"""Which implementation runs: `auto` takes what can run and says why; what was asked for by name runs or is refused."""

import subprocess
import sys

import pytest
import torch

from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.kernels import choice
from dynamic_llava.sparsity.kernels.choice import choose
from dynamic_llava.sparsity.ragged_attention import ragged_attention
from tests.sparsity.implementations import RUNS_TRITON

GPU = torch.device("meta")  # stands in for a GPU where the question is only what would be chosen


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("meta")], ids=str)
def test_auto_says_what_it_chose_and_why_once(caplog, device):
    caplog.set_level("INFO")
    chosen = [choose("MaskedSoftmax", "auto", "chunked", device, torch.float32, 64) for _ in range(2)]
    assert chosen == ["chunked"] * 2
    (message,) = caplog.messages
    assert message.startswith("MaskedSoftmax runs as chunked: ") and device.type in message.lower()


def test_auto_on_a_cpu_is_chunked():
    query, key, value = torch.randn(3, 2, 4, 80, 16)
    mask = (torch.rand(2, 80) < 0.5).float()
    expected = masked_softmax_attention(query, key, value, mask, implementation="chunked")
    assert torch.equal(masked_softmax_attention(query, key, value, mask), expected)


@pytest.mark.parametrize(
    ("dtype", "size", "message"), [(torch.float64, 16, "not in torch.float64"), (torch.float32, 160, "head size 128")]
)
def test_triton_refuses_what_it_has_no_blocks_for(dtype, size, message):
    tensor, mask = torch.zeros(1, 1, 4, size, dtype=dtype), torch.ones(1, 4)
    with pytest.raises(ValueError, match=message):
        masked_softmax_attention(tensor, tensor, tensor, mask, implementation="triton")


@pytest.mark.parametrize(
    ("capability", "chosen", "reason"),
    [((9, 0), "triton", "head size 64"), ((7, 5), "chunked", r"(8, 0)"), (None, "chunked", "NVIDIA")],
)
def test_auto_takes_triton_on_nvidia_gpus_of_a_new_enough_generation(monkeypatch, caplog, capability, chosen, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "nvidia_capability", lambda device: capability)
    caplog.set_level("INFO")
    assert choose("MaskedSoftmax", "auto", "chunked", GPU, torch.bfloat16, 64) == chosen
    assert reason in caplog.messages[0]
    if chosen != "triton":
        with pytest.raises(ValueError, match="triton cannot run here"):
            choose("MaskedSoftmax", "triton", "chunked", GPU, torch.bfloat16, 64)


def test_auto_without_triton_says_so(monkeypatch, caplog):
    monkeypatch.setattr(choice, "installed", lambda: False)
    caplog.set_level("INFO")
    assert choose("ragged attention", "auto", "sdpa", GPU, torch.bfloat16, 64) == "sdpa"
    assert "triton is not installed" in caplog.messages[0]


def test_a_cpu_never_imports_triton():
    """Importing Triton takes seconds, and whether its interpreter runs is decided when it is first imported."""
    code = (
        "import sys, torch; from dynamic_llava.sparsity import masked_softmax_attention as attention;"
        "from dynamic_llava.sparsity.ragged_attention import ragged_attention as ragged;"
        "x = torch.zeros(1, 1, 4, 16); attention(x, x, x, torch.ones(1, 4));"
        "ragged(x[:, :, :1], x, x, torch.zeros(1, dtype=torch.int64));"
        "assert not [name for name in sys.modules if 'kernels.triton' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(RUNS_TRITON, reason="here it can run")
def test_triton_on_a_cpu_is_refused():
    tensor, mask = torch.zeros(1, 1, 4, 16), torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"on the CPU and TRITON_INTERPRET=1 was not set.*use 'auto' or 'chunked'"):
        masked_softmax_attention(tensor, tensor, tensor, mask, implementation="triton")
    query, slots, lengths = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 8, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"on the CPU and TRITON_INTERPRET=1 was not set.*use 'auto' or 'sdpa'"):
        ragged_attention(query, slots, slots, lengths, implementation="triton")
