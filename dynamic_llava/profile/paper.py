"""The paper's measured times and memory (Tables 4 and 14, one A100 80G) beside the limits of that device."""

from collections.abc import Iterator
from typing import Any

from dynamic_llava.costs import DEVICE_PEAKS
from dynamic_llava.profile.inference_memory import inference_memory
from dynamic_llava.profile.presets import PRESETS, Preset, Way
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.work import prefill_work, step_work, vision_work

A100 = DEVICE_PEAKS["A100"]
BF16 = 2
PRINTED: tuple[tuple[str, str, int, Way, float | None], ...] = (
    ("table4", "prefill, s", 0, "dense", 0.83),
    ("table4", "prefill, s", 0, "both", 0.37),
    ("table4", "without cache, s", 1024, "dense", 1453),
    ("table4", "without cache, s", 2048, "dense", 4117),
    ("table4", "without cache, s", 4096, "dense", 13368),
    ("table4", "without cache, s", 1024, "both", 838),
    ("table4", "without cache, s", 2048, "both", 2382),
    ("table4", "without cache, s", 4096, "both", 6184),
    ("table4", "memory with cache, G", 1024, "dense", 46),
    ("table4", "memory with cache, G", 2048, "dense", 58),
    ("table4", "memory with cache, G", 4096, "dense", None),
    ("table4", "memory with cache, G", 1024, "both", 35),
    ("table4", "memory with cache, G", 2048, "both", 42),
    ("table4", "memory with cache, G", 4096, "both", 56),
    ("table14", "prefill, ms", 0, "dense", 124.52),
    ("table14", "prefill, ms", 0, "both", 72.51),
    ("table14", "step with cache, ms", 1000, "dense", 28.42),
    ("table14", "step with cache, ms", 1000, "both", 26.85),
)
"""Preset, measure, generated tokens, way, printed value (None: out of memory)."""


def prefill_limit(preset: Preset, way: Way) -> float:
    """Return the seconds of a prefill at the A100's peak, vision tower included; or of reading all weights once."""
    work, vision = prefill_work(preset, way, BF16), vision_work(preset, BF16)
    flops, moved = work.flops + vision.flops, work.bytes + vision.bytes
    return max(flops / (A100.tflops * 1e12), moved / (A100.terabytes * 1e12))


def uncached_limit(preset: Preset, way: Way, outputs: int) -> float:
    """Return the seconds of generating so many tokens without cache at the A100's peak."""
    steps = (prefill_work(preset, way, BF16, count).flops for count in range(outputs))
    return sum(steps) / (A100.tflops * 1e12)


def step_limit(preset: Preset, way: Way, outputs: int) -> float:
    """Return the seconds of a cached step half-way through an answer, at the A100's bandwidth."""
    return step_work(preset, way, BF16, outputs // 2).bytes / (A100.terabytes * 1e12)


def _limit(preset: Preset, measure: str, outputs: int, way: Way) -> float:
    if measure.startswith("memory"):
        return inference_memory(preset, way, outputs).total / 2**30
    if measure.startswith("without"):
        return uncached_limit(preset, way, outputs)
    seconds = prefill_limit(preset, way) if measure.startswith("prefill") else step_limit(preset, way, outputs)
    return seconds * (1e3 if measure.endswith("ms") else 1)


def _rows() -> Iterator[dict[str, Any]]:
    for name, measure, outputs, way, printed in PRINTED:
        limit = _limit(PRESETS[name], measure, outputs, way)
        row = {"preset": name, "measure": measure, "way": way, "outputs": outputs, "limit": limit}
        if printed is None:
            yield row | {"printed": "out of memory"}
        else:
            yield row | {"printed": printed, "share": limit / printed}


def paper_report() -> Report:
    """Return the paper's numbers with the least that an A100 (312 TFLOP/s, 2.039 TB/s) allows."""
    columns = (
        Column("preset", "table"),
        Column("measure", "measure"),
        Column("way", "way"),
        Column("outputs", "generated"),
        Column("printed", "paper"),
        Column("limit", "limit or need on that device", ".2f"),
        Column("share", "limit / paper", ".0%"),
    )
    notes = (
        "Time limits: FLOPs over 312 TFLOP/s, and for cached steps the bytes half-way through over 2.039 TB/s. Memory: "
        "what is needed by calculation, GiB.",
        "The dense model's 4K tokens fit into 80 GB by calculation; the paper's ran out of memory.",
    )
    return Report("paper", "The paper's times and memory, and what an A100 allows", columns, list(_rows()), notes)
