"""Everything that the device at hand can show, as a page for people and as JSON.

On a GPU the 7B and 13B protocols, on a CPU a reduced set. A part runs only if the time that is left allows it, and the
page names what was left out. Nothing that was not run gets a number.
"""

from pathlib import Path

import torch

from dynamic_llava.profile.cpu_set import cpu_parts
from dynamic_llava.profile.goals import CPU_GOALS, GPU_GOALS
from dynamic_llava.profile.gpu_set import gpu_parts
from dynamic_llava.profile.measurement_set import Found, run_set
from dynamic_llava.profile.page import write_benchmark, write_unmeasured

CPU_MINUTES, GPU_MINUTES = 4.8, 8.7
"""Time that a set may take, unless it is said."""


def benchmark(device: torch.device, minutes: float | None, folder: Path) -> list[Path]:
    """Run the set that suits the device within so many minutes and write its results; returns the paths."""
    on_cpu = device.type == "cpu"
    found = Found(device, torch.float32 if on_cpu else torch.bfloat16)
    if minutes is None:
        minutes = CPU_MINUTES if on_cpu else GPU_MINUTES
    run_set(found, cpu_parts() if on_cpu else gpu_parts(), minutes)
    paths = list(write_benchmark(found, CPU_GOALS if on_cpu else GPU_GOALS, folder, "bash scripts/benchmark.sh"))
    unmeasured = write_unmeasured(folder)
    return paths if unmeasured is None else [*paths, unmeasured]
