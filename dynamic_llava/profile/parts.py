"""What each part of a benchmark does; runner.py says in which order, and how long each may take.

A part writes down every row and every number as soon as it exists, because it may be ended at any moment. Parts share
nothing but the file of results. The rehearsal's parts are the GPU's, at sizes that any machine can run.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from dynamic_llava.costs import device_peak
from dynamic_llava.profile import checks
from dynamic_llava.profile.compiling import compile_rows, compiled_steps, compiling_report, side_by_side
from dynamic_llava.profile.inference_memory import measured_memory, memory_report
from dynamic_llava.profile.latency import (
    COMPILED,
    EAGER,
    Bench,
    Effort,
    Variant,
    failures,
    generate_rows,
    latency_report,
    prefill_rows,
    step_rows,
    total_rows,
    uncached_rows,
    vision_rows,
)
from dynamic_llava.profile.laws import kernel_laws
from dynamic_llava.profile.measuring import DeviceLimits, describe, measure_limits, with_limit
from dynamic_llava.profile.method_laws import method_laws
from dynamic_llava.profile.operations import (
    attention_report,
    attention_rows,
    new_length_report,
    new_length_rows,
    predictor_shares,
    ragged_report,
    ragged_rows,
)
from dynamic_llava.profile.presets import PRESETS, WAYS, Preset, small_shape
from dynamic_llava.profile.results import Column, Report, Results, device_name, measured_on, read
from dynamic_llava.profile.step_laws import step_laws
from dynamic_llava.profile.tables import curve_report, decoding_report, paper_report, prefill_report, tokens_report
from dynamic_llava.profile.training import training_report
from dynamic_llava.provenance import versions

STEPS = (Variant("both"), Variant("dense"), Variant("both", True), Variant("dense", True), Variant("image"))
"""The engines of a cached step, most telling first: ours and both dense baselines."""
FACTS = ("total_memory", "multi_processor_count", "major", "minor", "L2_cache_size", "shared_memory_per_multiprocessor")
"""Properties that a device is asked for, beside its name."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs and where its results go."""

    results: Results
    device: torch.device
    dtype: torch.dtype
    effort: Effort

    @property
    def name(self) -> str:
        """The device's name."""
        return device_name(self.device)

    def limits(self) -> DeviceLimits | None:
        """Return what the part `device` has measured; None where it has not come so far."""
        values: dict[str, float] = {}
        for entry in read(self.results.path):
            values |= entry.get("values", {})
        pair = values.get("copy_bytes_per_second"), values.get("matmul_flops_per_second")
        return None if None in pair else DeviceLimits(*pair)  # type: ignore[arg-type]

    def peak_flops(self) -> float:
        """FLOP/s by the data sheet, or as measured where the device is in no table."""
        peak = device_peak(self.name)
        if peak is not None:
            return peak.tflops * 1e12
        return (self.limits() or measure_limits(self.device, self.dtype)).flops_per_second


log = logging.getLogger(__name__)
PartOf = Callable[[Setting], None]


def run_part(name: str, chosen: str, results: Results, device: torch.device) -> None:
    """Run one part of a set, whose results name the device and all versions first; raises what the part raises."""
    on_cpu = device.type == "cpu"
    # A rehearsal measures as on an accelerator, one way after the other, also where the device is a CPU.
    effort = Effort(rounds=1, step_rounds=2, by_turns=False) if chosen == "rehearsal" else Effort.on(device)
    setting = Setting(results, device, torch.float32 if on_cpu else torch.bfloat16, effort)
    own = {**versions("triton"), "dtype": str(setting.dtype).removeprefix("torch.")}
    results.add(about={**measured_on(device), **own})
    torch._logging.set_logs(recompiles=True, perf_hints=True)  # a step that compiles twice or is not replayed says why
    PARTS[chosen][name](setting)


def _device(setting: Setting, small: bool = False) -> None:
    facts = {"name": setting.name, "kind": setting.device.type}
    if setting.device.type != "cpu":
        properties = torch.get_device_module(setting.device).get_device_properties(setting.device)
        facts |= {key: str(getattr(properties, key)) for key in FACTS if hasattr(properties, key)}
    rows = [{"fact": key, "value": value} for key, value in facts.items()]
    setting.results.table(Report("device", "Device", (Column("fact", "fact"), Column("value", "value")), rows))
    limits = measure_limits(setting.device, setting.dtype, 1 if small else 5)
    setting.results.values(
        copy_bytes_per_second=limits.bytes_per_second, matmul_flops_per_second=limits.flops_per_second
    )
    rows = [
        {"limit": "copy, GB/s, read and written", "value": limits.bytes_per_second / 1e9},
        {"limit": f"matrix product, TFLOP/s, {setting.dtype}", "value": limits.flops_per_second / 1e12},
    ]
    columns = (Column("limit", "limit"), Column("value", "measured", ".3f"))
    setting.results.table(Report("limits", "What the device reached", columns, rows))


def _hold(setting: Setting, title: str, found: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Try every law; those that do not hold are named, and raised together at the end."""
    columns = (Column("law", "law"), Column("holds", "holds"), Column("seconds", "s", ".1f"), Column("why", ""))
    setting.results.table(Report("laws", title, columns, []))
    broken = []
    for name, law in found:
        row, begun = {"law": name, "holds": "yes"}, time.perf_counter()
        try:
            law()
        except Exception as error:
            log.exception("%s", name)
            row |= {"holds": "no", "why": describe(error)}
            broken.append(f"{name} ({row['why']})")
        row["seconds"] = time.perf_counter() - begun
        setting.results.rows(title, [row])
    if broken:
        raise RuntimeError(f"{len(broken)} laws do not hold: {'; '.join(broken)}")


def _kernels(setting: Setting) -> None:
    _hold(setting, "Laws of the kernels", kernel_laws(setting.device).items())


def _methods(setting: Setting) -> None:
    _hold(setting, "Laws of every method and of training", method_laws(setting.device).items())


def _compiled(setting: Setting) -> None:
    _hold(setting, "Laws of the compiled step", step_laws(setting.device).items())


def _attention(setting: Setting, cells: Sequence[Mapping[str, Any]], implementations: Sequence[str]) -> None:
    """Measure cells of tokens, rows and keep rate; each gives a value attention_<tokens>_<percent>."""
    heads, width = cells[0]["heads"], cells[0]["width"]
    head = attention_report(setting.device, setting.dtype, heads, width)
    setting.results.table(head)
    for cell in cells:
        rows = setting.results.rows(head.title, attention_rows(implementations, setting.device, setting.dtype, **cell))
        ratios = {row["implementation"]: row["ratio"] for row in rows}
        if "auto" in ratios:
            setting.results.values(**{f"attention_{cell['tokens']}_{cell['keep_rate']:.0%}"[:-1]: ratios["auto"]})
        if "chunked" in ratios:
            found = {"chunked_over_plain": ratios["chunked"]}
            setting.results.values(**found, reference_over_chunked=ratios["reference"] / ratios["chunked"])


def _ragged(setting: Setting, cells: Sequence[tuple[int, int]], heads: int, width: int, calls: int) -> None:
    head = ragged_report(setting.dtype, heads, width)
    setting.results.table(head)
    rows: list[Mapping[str, Any]] = []
    for batch, slots in cells:
        sizes = {"batch": batch, "slots": slots, "heads": heads, "width": width, "calls": calls}
        found = ragged_rows(("auto", "sdpa"), setting.device, setting.dtype, **sizes)
        rows += setting.results.rows(head.title, found)
    if setting.device.type != "cpu":
        head = new_length_report(setting.dtype, heads, width)
        setting.results.table(head)
        setting.results.rows(head.title, new_length_rows(setting.device, setting.dtype, heads, width))
    _raise(failures(rows))


def _raise(failed: Sequence[str]) -> None:
    if failed:
        raise RuntimeError(f"{len(failed)} measurements failed: {'; '.join(failed)}")


def _times(
    setting: Setting, preset: Preset, rows: Iterable[Mapping[str, Any]], values_of: Callable[..., dict[str, float]]
) -> list[str]:
    """Write rows of times and what goals say of them as they come; returns what failed."""
    limits, results = setting.limits(), setting.results
    head, measured, known = latency_report(preset, [], limits), [], {}
    results.table(head)
    for row in rows:
        measured.append(row)
        results.rows(head.title, [row if limits is None else with_limit(row, limits)])
        values = values_of(preset, measured, setting.name)
        fresh = {key: value for key, value in values.items() if known.get(key) != value}
        if fresh:
            results.values(**fresh)
        known = values
    results.rows(head.title, total_rows(preset, measured))
    return failures(measured)


def _compiling(setting: Setting, presets: Sequence[Preset], variants: Sequence[Variant] = STEPS) -> None:
    steps = compiled_steps(presets, variants)
    head = compiling_report(side_by_side(steps, setting.device, setting.dtype))
    setting.results.table(head)
    rows = compile_rows(steps, setting.device, setting.dtype, setting.effort)
    _raise(failures(setting.results.rows(head.title, rows)))


def _steps(setting: Setting, presets: Sequence[Preset], variants: Sequence[Variant] = STEPS) -> None:
    failed = []
    for preset in presets:
        bench = Bench(preset, setting.device, setting.dtype, setting.effort)
        failed += _times(setting, preset, step_rows(bench, variants, preset.outputs), checks.step_values)
        torch._dynamo.reset()  # recorded graphs hold memory
    _raise(failed)


def _prefill(setting: Setting, presets: Sequence[Preset]) -> None:
    failed = []
    for preset in presets:
        bench = Bench(preset, setting.device, setting.dtype, replace(setting.effort, rounds=3))
        rows = chain(prefill_rows(bench), vision_rows(bench))
        failed += _times(setting, preset, rows, checks.prefill_values)
    _raise(failed)


def _generate(setting: Setting, preset: Preset, tokens: int) -> None:
    bench = Bench(preset, setting.device, setting.dtype, setting.effort)
    _raise(_times(setting, preset, generate_rows(bench, STEPS, tokens), lambda *_: {}))


def _training(setting: Setting, preset: Preset) -> None:
    report = training_report(preset, setting.device, setting.dtype, setting.peak_flops())
    setting.results.table(report)
    setting.results.values(training_mfu=report.rows[0]["share"])


def _predictors(setting: Setting, preset: Preset) -> None:
    report = predictor_shares(preset, setting.device, setting.dtype)
    setting.results.table(report)
    image, output = report.rows
    setting.results.values(
        image_predictor_share=image["share"],
        output_predictor_share=output["share"],
        output_predictor_bytes=output["calculated"],
    )


def _cache(setting: Setting) -> None:
    setting.results.values(**checks.generated_bytes(PRESETS["cpu-bytes"], setting.device, setting.dtype))


def _cpu_steps(setting: Setting) -> None:
    setting = replace(setting, effort=Effort(step_rounds=12))
    _steps(setting, (PRESETS["cpu"],))
    bench = Bench(PRESETS["cpu"], setting.device, setting.dtype, Effort(step_rounds=8))
    setting.results.values(**checks.dropped_tokens_ratio(bench))


def _small_steps(setting: Setting) -> None:
    preset = PRESETS["cpu-small"]
    setting.results.values(**checks.compiled_decoding(preset, setting.device, setting.dtype))
    _steps(replace(setting, effort=Effort(step_rounds=48)), (preset,), (*EAGER, *COMPILED))


def _uncached(setting: Setting) -> None:
    preset = PRESETS["cpu-uncached"]
    bench = Bench(preset, setting.device, setting.dtype, Effort(rounds=3, step_rounds=8))
    lengths = (0, *preset.outputs)
    cached = chain(vision_rows(bench), prefill_rows(bench), step_rows(bench, EAGER, lengths))
    _raise(_times(setting, preset, chain(cached, uncached_rows(bench, lengths)), lambda *_: {}))


def measured_report(bench: Bench) -> Report:
    """Return calculated and measured memory of the bench's preset."""

    def measure(way: Any, outputs: int) -> Any:
        return measured_memory(bench.model, bench.twin, bench.preset, way, outputs)

    return memory_report(bench.preset, bench.preset.ways, bench.value_bytes, measure)


def _memory(setting: Setting) -> None:
    preset = replace(PRESETS["cpu-uncached"].with_layers(4), outputs=(512,))
    setting.results.table(measured_report(Bench(preset, setting.device, setting.dtype, setting.effort)))


def _calculated(setting: Setting) -> None:
    """Write what needs no device: the paper's tables, recomputed, and the curves of Fig. 1."""
    memory = [memory_report(PRESETS[name], WAYS, 2) for name in ("table4", "7b-b8")]
    curve = curve_report(PRESETS["table4"], 5120)
    for report in (prefill_report(), decoding_report(), tokens_report(), paper_report(), *memory, curve):
        setting.results.table(report)


def _gpu_parts(small: bool) -> dict[str, PartOf]:
    """Return the GPU's parts, at 7B's sizes or at tiny ones."""

    def sized(name: str, outputs: tuple[int, ...]) -> Preset:
        preset = PRESETS[name]
        if not small:
            return replace(preset, outputs=outputs)
        shape = small_shape(64, 4, 256)
        shape = replace(shape, vision=replace(shape.vision, patches=64), tokens_per_image=64)
        outputs = tuple(8 * (place + 1) for place in range(len(outputs)))
        return replace(preset, shape=shape, batch=min(2, preset.batch), outputs=outputs, text=9)

    heads, width = (2, 16) if small else (32, 128)
    lengths = ((16, 1), (40, 1)) if small else ((2048, 4), (4096, 2), (700, 8))
    effort = {"heads": heads, "width": width, "rounds": 2 if small else 5, "calls": 1 if small else 5}
    cells = [
        {"tokens": tokens, "batch": batch, "keep_rate": rate, **effort}
        for tokens, batch in lengths
        for rate in (0.3, 0.5, 1.0)
    ]
    slots = ((1, 40), (2, 80)) if small else ((8, 1024), (8, 4096), (1, 1024), (1, 4096))
    one, eight = sized("7b-b1", (512,)), sized("7b-b8", (1024, 4096))
    return {
        "device": partial(_device, small=small),
        "methods": _methods,
        "compiling": partial(_compiling, presets=(eight, one)),
        "steps-batch-8": partial(_steps, presets=(eight,)),
        "steps-batch-1": partial(_steps, presets=(one,)),
        "prefill": partial(_prefill, presets=(eight, one)),
        "training": partial(_training, preset=eight),
        "ragged": partial(_ragged, cells=slots, heads=heads, width=width, calls=2 if small else 50),
        "predictors": partial(_predictors, preset=one),
        "attention": partial(_attention, cells=cells, implementations=("auto",)),
        "compiled": _compiled,
        "kernels": _kernels,
        "generate": partial(_generate, preset=one, tokens=6 if small else 128),
    }


_CPU_CELL = {"tokens": 2048, "keep_rate": 0.5, "heads": 8, "width": 64}
_TRAINING = replace(PRESETS["cpu-small"].with_layers(4), batch=2)
PARTS: dict[str, dict[str, PartOf]] = {
    "gpu": _gpu_parts(small=False),
    "rehearsal": _gpu_parts(small=True),
    "cpu": {
        "device": _device,
        "cache": _cache,
        "steps": _cpu_steps,
        "prefill": partial(_prefill, presets=(PRESETS["cpu-prefill"],)),
        "attention": partial(_attention, cells=[_CPU_CELL], implementations=("reference", "chunked")),
        "small-steps": _small_steps,
        "predictors": partial(_predictors, preset=PRESETS["7b-b1"]),
        "uncached": _uncached,
        "memory": _memory,
        "training": partial(_training, preset=_TRAINING),
        "calculated": _calculated,
    },
}
"""The function of every part, by set and name."""
