"""Compiling every step of a benchmark before any is timed: side by side, into the compiler's own files on the disk.

A graph of all layers takes minutes on one core, and one process compiles on one core. Processes of their own share
torch's on-disk cache; the parts that time a step afterwards find its kernels there.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from dynamic_llava.profile.latency import STEP_WARMUP, Bench, Effort, Variant, step_call
from dynamic_llava.profile.measuring import describe, step_work, synchronize
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.results import Column, Report, Rows

CORES_EACH = 2
"""Cores for one process: the graph's own, and one for the compilers of its kernels."""
MEMORY_EACH = 1.3
"""Memory of a process, over the bytes that a dense step reads: activations, and weights while they are made."""


@dataclass(frozen=True)
class Compiled:
    """A step to compile: whose it is, and how many tokens are behind it."""

    preset: Preset
    variant: Variant
    outputs: int

    def run(self, device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
        """Compile the step and run it as often as before a timed one; returns the seconds from its first call on."""
        bench = Bench(self.preset, device, dtype, effort)
        with torch.no_grad():
            call = step_call(bench, self.variant, self.outputs)
            synchronize(device)
            begun = time.perf_counter()
            for _ in range(STEP_WARMUP):
                call()
            synchronize(device)
        return time.perf_counter() - begun


def compiled_steps(presets: Sequence[Preset], variants: Sequence[Variant]) -> list[Compiled]:
    """Return one entry for each graph: ours serves every length, a StaticCache's serves one."""
    return [
        Compiled(preset, variant, outputs)
        for preset in presets
        for variant in variants
        if variant.compiled
        for outputs in (preset.outputs if variant.way == "dense" else preset.outputs[:1])
    ]


def side_by_side(steps: Sequence[Compiled], device: torch.device, dtype: torch.dtype) -> int:
    """Return how many processes may compile at once, at least one, by the cores here and the device's free memory."""
    at_once = min(len(steps), max(1, (os.cpu_count() or 1) // CORES_EACH))
    if device.type == "cpu":
        return at_once
    free, _ = torch.get_device_module(device).mem_get_info(device)
    largest = max(step_work(step.preset, "dense", dtype.itemsize, step.outputs).bytes for step in steps)
    return max(1, min(at_once, int(free / (largest * MEMORY_EACH))))


def compile_rows(steps: Sequence[Compiled], device: torch.device, dtype: torch.dtype, effort: Effort) -> Rows:
    """Compile the steps side by side; yields a row for each when it is ready, with `failed` where it cannot be."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(side_by_side(steps, device, dtype), mp_context=fresh, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(step.run, device, dtype, effort): step for step in steps}
        for future in as_completed(waiting):
            step, error = waiting[future], future.exception()
            row = {"preset": step.preset.name, "phase": "compiling", "way": step.variant.way}
            row |= {"engine": step.variant.engine, "outputs": step.outputs}
            yield row | ({"seconds": future.result()} if error is None else {"failed": describe(error)})


def compiling_report(at_once: int) -> Report:
    """Return the head of the table of compile_rows."""
    columns = (
        Column("preset", "preset"),
        Column("way", "way"),
        Column("engine", "engine"),
        Column("outputs", "generated"),
        Column("seconds", "s", ".1f"),
        Column("failed", ""),
    )
    notes = (
        f"Up to {at_once} processes side by side, each from an empty cache; seconds of the first {STEP_WARMUP} steps.",
        "Parts that time these steps find them compiled on the disk.",
    )
    return Report("compiling", "Compiling", columns, [], notes)
