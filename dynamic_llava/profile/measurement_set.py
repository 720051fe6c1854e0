"""A set of measurements: parts that run while time is left, and what they have found."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dynamic_llava.costs import device_peak
from dynamic_llava.profile.inference_memory import measured_memory, memory_report
from dynamic_llava.profile.latency import Bench, latency_report
from dynamic_llava.profile.presets import PRESETS, WAYS, Preset
from dynamic_llava.profile.report import Report, device_name
from dynamic_llava.profile.roofline import DeviceLimits, measure_limits, roofline_report
from dynamic_llava.profile.shares import predictor_shares

log = logging.getLogger(__name__)


@dataclass
class Found:
    """What a set has found so far."""

    device: torch.device
    dtype: torch.dtype
    limits: DeviceLimits | None = None
    values: dict[str, float] = field(default_factory=dict)
    """Numbers that goals are set for."""
    reports: list[Report] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def device_limits(self) -> DeviceLimits:
        """Return the measured limits, measuring them when first asked."""
        if self.limits is None:
            self.limits = measure_limits(self.device, self.dtype)
        return self.limits


@dataclass(frozen=True)
class Part:
    """One part of a set."""

    name: str
    minutes: float
    """What has to be left of the time for it to begin."""
    run: Callable[[Found], None]


def run_set(found: Found, parts: Sequence[Part], minutes: float) -> None:
    """Run the parts that fit into so many minutes, in order; those that lack time or memory are named."""
    begun = time.monotonic()
    for part in parts:
        left = minutes - (time.monotonic() - begun) / 60
        if left < part.minutes:
            found.left_out.append(f"{part.name}: {left:.1f} minutes were left, {part.minutes:g} are needed")
            continue
        log.info("%s (%.1f minutes left)", part.name, left)
        try:
            part.run(found)
        except torch.OutOfMemoryError as error:
            found.left_out.append(f"{part.name}: out of memory ({str(error).splitlines()[0]})")
        torch._dynamo.reset()  # recorded graphs hold memory
        if found.device.type != "cpu":
            torch.accelerator.empty_cache()


def add_times(found: Found, preset: Preset, rows: list[dict[str, Any]]) -> None:
    """Add rows of times to the reports, and what the device allows beside them."""
    found.reports.append(latency_report(preset, rows))
    found.reports.append(roofline_report(preset.name, [*rows], found.device_limits()))


def measured_report(bench: Bench) -> Report:
    """Return calculated and measured memory of the bench's preset."""

    def measure(way: Any, outputs: int) -> Any:
        return measured_memory(bench.model, bench.twin, bench.preset, way, outputs)

    return memory_report(bench.preset, WAYS, bench.value_bytes, measure)


def measure_shares(found: Found) -> None:
    """Measure what the predictors cost at 7B size."""
    report = predictor_shares(PRESETS["7b-b1"], found.device, found.dtype)
    image, output = report.rows
    found.values |= {
        "image_predictor_share": image["share"],
        "output_predictor_share": output["share"],
        "output_predictor_bytes": output["calculated"],
    }
    found.reports.append(report)


def peak_flops(found: Found) -> float:
    """FLOP/s by the data sheet, or as measured where the device is in no table."""
    peak = device_peak(device_name(found.device))
    return found.device_limits().flops_per_second if peak is None else peak.tflops * 1e12
