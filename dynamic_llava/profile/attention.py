"""Training attention beside torch's own: MaskedSoftmax (Eq. 7) against plain causal attention, forward and backward."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dynamic_llava.profile.timing import time_in_turn
from dynamic_llava.sparsity import masked_softmax_attention

KEPT = 0.5
"""Share of the keys that is kept."""


def attention_ratios(
    implementations: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    batch: int = 1,
    heads: int = 8,
    width: int = 64,
    rounds: int = 3,
) -> dict[str, float]:
    """Return each implementation's time over plain causal attention's, all gradients included, run by turns.

    Plain attention is FlashAttention-2 on an accelerator, and what torch chooses on a CPU.
    """
    torch.manual_seed(0)
    query, key, value, upstream = (
        torch.randn(batch, heads, tokens, width, device=device, dtype=dtype) for _ in range(4)
    )
    keep = (torch.rand(batch, tokens, device=device) < KEPT).float()
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, keep)]

    def plain() -> Tensor:
        with nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    def masked(implementation: Any) -> Callable[[], Tensor]:
        return lambda: masked_softmax_attention(query, key, value, keep, implementation=implementation)

    ways = {"plain": _both_passes(plain, inputs[:3], upstream)}
    ways |= {name: _both_passes(masked(name), inputs, upstream) for name in implementations}
    times = time_in_turn(ways, device, rounds)
    return {name: times[name].median / times["plain"].median for name in implementations}


def _both_passes(attend: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attend(), inputs, upstream)
