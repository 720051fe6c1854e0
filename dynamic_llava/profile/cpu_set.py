"""The reduced set for two CPU cores: ratios that hold on a small machine, at sizes that fit one."""

import os
import shutil
from dataclasses import replace

from dynamic_llava.profile import checks
from dynamic_llava.profile.attention import attention_ratios
from dynamic_llava.profile.latency import (
    COMPILED,
    EAGER,
    Bench,
    Effort,
    prefill_rows,
    step_rows,
    uncached_rows,
    vision_rows,
)
from dynamic_llava.profile.measurement_set import Found, Part, add_times, measure_shares, measured_report
from dynamic_llava.profile.presets import PRESETS
from dynamic_llava.profile.training_speed import training_report


def cpu_parts() -> list[Part]:
    """Return the reduced set, for two CPU cores."""
    return [
        Part("cache bytes", 0.5, _cache_bytes),
        Part("cached steps", 1.2, _steps),
        Part("prefill", 0.5, _prefill),
        Part("training attention", 0.3, _attention),
        Part("compiled steps", 0.8, _compiled),
        Part("predictors at 7B size", 0.5, measure_shares),
        Part("steps without cache", 0.3, _uncached),
        Part("memory", 0.3, _memory),
        Part("training step", 0.2, _training),
    ]


def _cache_bytes(found: Found) -> None:
    found.values |= checks.generated_bytes(PRESETS["cpu-bytes"], found.device, found.dtype)


def _steps(found: Found) -> None:
    preset = PRESETS["cpu"]
    bench = Bench(preset, found.device, found.dtype, Effort(step_rounds=32))
    rows = step_rows(bench, EAGER, preset.outputs)
    found.values |= checks.step_ratios(rows, preset.outputs[-1])
    bench.effort = Effort(step_rounds=8)
    found.values |= checks.dropped_tokens_ratio(bench)
    add_times(found, preset, rows)


def _prefill(found: Found) -> None:
    preset = PRESETS["cpu-prefill"]
    rows = prefill_rows(Bench(preset, found.device, found.dtype, Effort(rounds=3)))
    found.values |= checks.prefill_ratio(rows)
    add_times(found, preset, rows)


def _attention(found: Found) -> None:
    ratios = attention_ratios(("reference", "chunked"), found.device, found.dtype, tokens=2048)
    found.values["chunked_over_plain"] = ratios["chunked"]
    found.values["reference_over_chunked"] = ratios["reference"] / ratios["chunked"]


def _compiled(found: Found) -> None:
    if not has_compiler():
        found.left_out.append("compiled steps: torch.compile needs a C++ compiler, and none is on the path")
        return
    preset = PRESETS["cpu-small"]
    found.values |= checks.compiled_decoding(preset, found.device, found.dtype)
    bench = Bench(preset, found.device, found.dtype, Effort(step_rounds=48))
    add_times(found, preset, step_rows(bench, [*EAGER, *COMPILED], preset.outputs))


def has_compiler() -> bool:
    """Return whether torch.compile can build code for a CPU: $CXX, g++ or clang++ is there."""
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))


def _uncached(found: Found) -> None:
    preset = PRESETS["cpu-uncached"]
    bench = Bench(preset, found.device, found.dtype, Effort(rounds=3, step_rounds=8))
    lengths = (0, *preset.outputs)
    rows = vision_rows(bench) + prefill_rows(bench) + step_rows(bench, EAGER, lengths) + uncached_rows(bench, lengths)
    add_times(found, preset, rows)


def _memory(found: Found) -> None:
    preset = replace(PRESETS["cpu-uncached"].with_layers(4), outputs=(512,))
    bench = Bench(preset, found.device, found.dtype, Effort())
    found.reports.append(measured_report(bench))


def _training(found: Found) -> None:
    preset, peak = replace(PRESETS["cpu-small"].with_layers(4), batch=2), found.device_limits().flops_per_second
    found.reports.append(training_report(preset, found.device, found.dtype, peak))
