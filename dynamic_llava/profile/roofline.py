"""The limit of a device, from what it does in the same run: bytes over copy bandwidth, FLOPs over matmul rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dynamic_llava.profile.report import Column
from dynamic_llava.profile.timing import time_in_turn


@dataclass(frozen=True)
class DeviceLimits:
    """What the device reached in this run."""

    bytes_per_second: float
    """Bytes read and written by a copy of a large tensor."""
    flops_per_second: float
    """Of a large square matrix product in the model's dtype."""

    def seconds(self, work_bytes: float, flops: float) -> float:
        """Return the least time for moving so many bytes and doing so many operations, each hidden behind the other."""
        return max(work_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> DeviceLimits:
    """Measure copy bandwidth and matmul rate with tensors too large for any cache; the best round counts."""
    on_cpu = device.type == "cpu"
    source = torch.randn(2**26 if on_cpu else 2**30, device=device, dtype=dtype)
    target = torch.empty_like(source)
    side = 2048 if on_cpu else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    ways = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right, out=product)}
    times = time_in_turn(ways, device, rounds, calls=1 if on_cpu else 10)
    moved = 2 * source.numel() * source.element_size()
    return DeviceLimits(moved / times["copy"].low, 2 * side**3 / times["matmul"].low)


def with_limit(row: Mapping[str, Any], limits: DeviceLimits) -> dict[str, Any]:
    """Return a row of times with the least time for its work and the share that was reached, where it has both."""
    if not (row.get("flops") and row.get("bytes") and row.get("seconds")):
        return dict(row)
    least = limits.seconds(row["bytes"], row["flops"])
    bound = "bytes" if row["bytes"] / limits.bytes_per_second >= least else "FLOPs"
    return {**row, "limit": least, "bound": bound, "share": least / row["seconds"]}


LIMIT_COLUMNS = (
    Column("bytes", "GB", ".3f", 1e-9),
    Column("flops", "GFLOP", ".1f", 1e-9),
    Column("limit", "limit, ms", ".3f", 1e3),
    Column("bound", "bound by"),
    Column("share", "limit / measured", ".0%"),
)
"""What a table of times shows beside them."""


def limit_notes(limits: DeviceLimits) -> list[str]:
    """Return what has to be said about the limits."""
    return [
        f"Limits measured in this run: copy {limits.bytes_per_second / 1e9:.1f} GB/s, matrix product "
        f"{limits.flops_per_second / 1e12:.3f} TFLOP/s.",
        "Bytes: weights once, keys and values of every row. FLOPs: linear maps, causal attention, head, predictors.",
    ]
