"""The method's two attentions beside torch's own: MaskedSoftmax (Eq. 7) in training, ragged attention in decoding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.timing import Timing, attempt, describe, time_in_turn
from dynamic_llava.sparsity import masked_softmax_attention
from dynamic_llava.sparsity.ragged_attention import ragged_attention

Rows = Iterator[dict[str, Any]]


def attention_rows(
    implementations: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    keep_rate: float = 0.5,
    batch: int = 1,
    heads: int = 8,
    width: int = 64,
    rounds: int = 3,
    calls: int = 1,
) -> Rows:
    """Yield each implementation's time of both passes, all gradients included, beside plain causal attention's.

    Plain attention is FlashAttention-2 on an accelerator, and what torch chooses on a CPU; all of them take turns.
    """
    torch.manual_seed(0)
    query, key, value, upstream = (
        torch.randn(batch, heads, tokens, width, device=device, dtype=dtype) for _ in range(4)
    )
    keep = (torch.rand(batch, tokens, device=device) < keep_rate).float()
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, keep)]

    def plain() -> Tensor:
        with nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    def masked(implementation: Any) -> Callable[[], Tensor]:
        return lambda: masked_softmax_attention(query, key, value, keep, implementation=implementation)

    ways = {"plain": _both_passes(plain, inputs[:3], upstream)}
    ways |= {name: _both_passes(masked(name), inputs, upstream) for name in implementations}
    times = time_in_turn(ways, device, rounds, calls=calls)
    for name in implementations:
        yield {
            "tokens": tokens,
            "batch": batch,
            "keep_rate": keep_rate,
            "implementation": name,
            "seconds": times[name].median,
            "low": times[name].low,
            "high": times[name].high,
            "plain": times["plain"].median,
            "ratio": times[name].median / times["plain"].median,
        }


def attention_report(device: torch.device, dtype: torch.dtype, heads: int, width: int) -> Report:
    """Return the head of the table of attention_rows."""
    plain = "torch's own" if device.type == "cpu" else "FlashAttention-2"
    columns = (
        Column("tokens", "tokens"),
        Column("batch", "rows"),
        Column("keep_rate", "kept", ".0%"),
        Column("implementation", "implementation"),
        Column("seconds", "MaskedSoftmax, ms", ".3f", 1e3),
        Column("low", "quartile, ms", ".3f", 1e3),
        Column("high", "quartile, ms", ".3f", 1e3),
        Column("plain", f"{plain}, ms", ".3f", 1e3),
        Column("ratio", "ratio", ".2f"),
    )
    notes = (f"Forward and backward, {dtype}, {heads} heads of {width}; {plain} is causal and without a mask.",)
    return Report("attention", "Training attention, both passes", columns, [], notes)


def _both_passes(attend: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attend(), inputs, upstream)


def ragged_rows(
    implementations: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
    slots: int,
    heads: int,
    width: int,
    rounds: int = 5,
    calls: int = 1,
) -> Rows:
    """Yield the time of attention from one token per row to rows filled by a half to all, each way when it is measured.

    "plain" is torch's attention over rows that are all filled, without a mask. Bytes are keys and values of filled
    slots, which is what has to be read.
    """
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width, device=device, dtype=dtype)
    keys, values = torch.randn(2, batch, heads, slots, width, device=device, dtype=dtype)
    lengths = torch.linspace(slots // 2, slots - 1, batch, device=device).long()
    filled, one = int((lengths + 1).sum()), 2 * heads * width * dtype.itemsize
    ways: dict[str, Callable[[], Any]] = {
        name: partial(ragged_attention, query, keys, values, lengths, implementation=name) for name in implementations
    }
    ways["plain"] = partial(scaled_dot_product_attention, query, keys, values)
    for name, way in ways.items():
        moved = one * (batch * slots if name == "plain" else filled)
        row = {"batch": batch, "slots": slots, "implementation": name, "bytes": moved, "seconds": None}
        with torch.no_grad():
            timing = attempt((name, batch, slots), partial(_one, way, device, rounds, calls))
        if isinstance(timing, Exception):
            yield row | {"phase": "ragged", "way": f"{batch} x {slots}", "engine": name, "failed": describe(timing)}
            continue
        spread = {"seconds": timing.median, "low": timing.low, "high": timing.high}
        yield row | spread | {"rate": moved / timing.median}


def _one(way: Callable[[], Any], device: torch.device, rounds: int, calls: int) -> Timing:
    return time_in_turn({"one": way}, device, rounds, calls=calls, warmup=2)["one"]


def ragged_report(dtype: torch.dtype, heads: int, width: int) -> Report:
    """Return the head of the table of ragged_rows."""
    columns = (
        Column("batch", "rows"),
        Column("slots", "slots"),
        Column("implementation", "implementation"),
        Column("seconds", "ms", ".4f", 1e3),
        Column("low", "quartile, ms", ".4f", 1e3),
        Column("high", "quartile, ms", ".4f", 1e3),
        Column("bytes", "MB", ".2f", 1e-6),
        Column("rate", "GB/s", ".1f", 1e-9),
        Column("failed", ""),
    )
    notes = (
        f"{dtype}, {heads} heads of {width}; rows are filled by a half to all. plain: all slots of all rows, no mask.",
    )
    return Report("ragged", "Attention of one new token per row", columns, [], notes)
