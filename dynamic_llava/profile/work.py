"""The FLOPs and the bytes of each phase of a preset; profiles hold the measured time of the phase against them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import (
    decode_step_bytes,
    flops_decode_step,
    head_flops,
    predictor_flops,
    prefill_flops,
    weight_bytes,
)
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.profile.measuring import time_in_turn
from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.results import Column


@dataclass(frozen=True)
class Work:
    """What a phase has to do at least."""

    flops: int
    bytes: int
    """Bytes to read: weights once for the whole batch, keys and values of every row."""


def work_of(phase: str, preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a phase: vision, prefill, step, step without cache. ValueError for another one."""
    if phase == "vision":
        return vision_work(preset, value_bytes)
    if phase in ("prefill", "step without cache"):
        return prefill_work(preset, way, value_bytes, outputs)
    if phase == "step":
        return step_work(preset, way, value_bytes, outputs)
    raise ValueError(f"phase={phase!r} is not known; choose vision, prefill, step or step without cache")


def vision_work(preset: Preset, value_bytes: int) -> Work:
    """Return the work of vision tower and projector on one image per row."""
    shape = preset.shape
    flops = preset.batch * (shape.vision.flops + shape.projector.forward)
    return Work(flops, value_bytes * (shape.vision.parameters + shape.projector.parameters))


def prefill_work(preset: Preset, way: Way, value_bytes: int, outputs: int = 0) -> Work:
    """Return the work of a prefill, or of a step without cache after `outputs` tokens; predictors included."""
    decoder = preset.shape.decoder
    flops = prefill_flops(shape=decoder, **preset.groups(way, outputs), batch=preset.batch)
    if way != "dense" and preset.method is None:
        decided = outputs if way == "both" else 0
        image_tokens = preset.shape.tokens_per_image
        flops += preset.batch * predictor_flops(decoder.hidden, image_tokens, output_tokens=decided)
    return Work(flops, weight_bytes(decoder, value_bytes))


def step_work(preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a cached step after `outputs` tokens, the output predictor of _I|T included."""
    decoder, groups = preset.shape.decoder, preset.groups(way, outputs)
    flops = flops_decode_step(shape=decoder, **groups, batch=preset.batch) + head_flops(preset.batch, decoder)
    moved = decode_step_bytes(decoder, **groups, bytes_per_value=value_bytes, batch=preset.batch)
    if way == "both" and preset.method is None:
        extra = output_predictor_work(preset, value_bytes)
        return Work(flops + extra.flops, moved + extra.bytes)
    return Work(flops, moved)


def output_predictor_work(preset: Preset, value_bytes: int) -> Work:
    """Return what the output predictor adds to a step."""
    judges = [
        part for part in learned_costs(SparsityConfig(), preset.shape.decoder.hidden).values() if part.judges_outputs
    ]
    flops = preset.batch * sum(part.judging(1) for part in judges)
    return Work(flops, value_bytes * sum(part.parameters for part in judges))


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
