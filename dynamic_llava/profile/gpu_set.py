"""The full set for one GPU: the paper's protocols and 7B at batch 1 and 8, eager and compiled; and a training step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dynamic_llava.costs import device_peak
from dynamic_llava.profile.attention import attention_ratios
from dynamic_llava.profile.latency import (
    COMPILED,
    EAGER,
    Bench,
    Effort,
    Variant,
    prefill_rows,
    step_rows,
    uncached_rows,
    vision_rows,
)
from dynamic_llava.profile.measurement_set import Found, Part, add_times, measure_shares, measured_report, peak_flops
from dynamic_llava.profile.presets import PRESETS, Preset
from dynamic_llava.profile.report import device_name
from dynamic_llava.profile.training_speed import training_report


def gpu_parts() -> list[Part]:
    """Return the full set; what the goals need comes first."""
    one, eight, table4, table14 = (PRESETS[name] for name in ("7b-b1", "7b-b8", "table4", "table14"))
    sparse = (Variant("both", True),)
    return [
        Part("7B, batch 1", 1.5, partial(_protocol, preset=one, compiled=sparse, lengths=(0, 512, 1024))),
        Part("7B, batch 8", 2.0, partial(_protocol, preset=eight, compiled=COMPILED, lengths=(0, 1024, 2048, 4096))),
        Part("training attention", 0.2, _attention),
        Part("training step", 1.0, _training),
        Part("Table 14", 0.7, partial(_protocol, preset=table14, lengths=(0, 500, 1000), uncached=False)),
        Part("Table 4", 2.0, partial(_protocol, preset=table4, lengths=(0, 1024, 2048, 4096))),
        Part("memory of Table 4", 0.7, partial(_memory, preset=table4)),
        Part("predictors at 7B size", 0.3, measure_shares),
        Part("Table 14, compiled", 2.0, partial(_compiled, preset=table14, lengths=(500,))),
    ]


def _attention(found: Found) -> None:
    for tokens in (2048, 4096):
        sizes = {"tokens": tokens, "batch": 4, "heads": 32, "width": 128}
        ratios = attention_ratios(("auto",), found.device, found.dtype, rounds=10, **sizes)
        found.values[f"attention_{tokens}"] = ratios["auto"]


def _training(found: Found) -> None:
    report = training_report(PRESETS["7b-b8"], found.device, found.dtype, peak_flops(found))
    found.values["training_mfu"] = report.rows[0]["share"]
    found.reports.append(report)


def _protocol(
    found: Found,
    preset: Preset,
    lengths: Sequence[int],
    compiled: Sequence[Variant] = (),
    uncached: bool = True,
) -> None:
    """Measure a protocol's times: vision, prefill, steps eager and compiled, steps without cache."""
    bench = Bench(preset, found.device, found.dtype, Effort.on(found.device))
    rows = vision_rows(bench) + prefill_rows(bench)
    rows += step_rows(bench, [*EAGER, *compiled], lengths)
    if uncached:
        bench.effort = replace(bench.effort, rounds=2)
        rows += uncached_rows(bench, (0, *preset.outputs))
    found.values |= gpu_values(preset, rows, device_name(found.device))
    add_times(found, preset, rows)


def _compiled(found: Found, preset: Preset, lengths: Sequence[int]) -> None:
    bench = Bench(preset, found.device, found.dtype, Effort.on(found.device))
    add_times(found, preset, step_rows(bench, COMPILED, lengths))


def _memory(found: Found, preset: Preset) -> None:
    found.reports.append(measured_report(Bench(preset, found.device, found.dtype, Effort.on(found.device))))


def gpu_values(preset: Preset, rows: Sequence[dict[str, Any]], device: str) -> dict[str, float]:
    """Return the numbers of a protocol that goals are set for, by the data sheet's peaks; none without those."""
    peak = device_peak(device)
    if peak is None:
        return {}
    found: dict[str, float] = {}
    for row in rows:
        if row["seconds"] is None:
            continue
        if row["phase"] == "prefill":
            found[f"prefill_{preset.name}_{row['way']}_mfu"] = row["flops"] / row["seconds"] / (peak.tflops * 1e12)
    middle = preset.outputs[0] // 2 if preset.batch == 1 else preset.outputs[0]
    steps = {
        row["way"]: row
        for row in rows
        if row["phase"] == "step" and "compiled" in row["engine"] and row["outputs"] == middle and row["seconds"]
    }
    if "both" in steps:
        both = steps["both"]
        found[f"decode_{preset.name}_bandwidth"] = both["bytes"] / both["seconds"] / (peak.terabytes * 1e12)
        found[f"decode_{preset.name}_ms"] = 1e3 * both["seconds"]
        if "dense" in steps:
            dense = steps["dense"]
            reached, possible = dense["seconds"] / both["seconds"], dense["bytes"] / both["bytes"]
            found[f"decode_{preset.name}_speedup"] = reached / possible
    return found
