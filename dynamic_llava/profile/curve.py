"""FLOPs and memory over the generated tokens (Fig. 1), calculated: what a step costs as an answer grows.

Without cache a step runs the whole sequence again, so its FLOPs grow; with cache the memory does.
"""

from dataclasses import replace

from dynamic_llava.profile.inference_memory import inference_memory
from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.work import prefill_work

POINTS = 20
"""Steps of the grid between 0 and the longest answer."""


def curve_lines(preset: Preset) -> dict[str, tuple[Preset, Way]]:
    """Return the lines of Fig. 1: dense, FastV (k = 3, r = 0.75: image tokens only), Dynamic-LLaVA_I|T."""
    fastv = replace(preset, sparse_layer=min(3, preset.shape.decoder.layers - 1), image_keep_rate=0.25)
    return {"LLaVA-1.5": (preset, "dense"), "FastV": (fastv, "image"), "Dynamic-LLaVA_I|T": (preset, "both")}


def curve_report(preset: Preset, longest: int, bytes_per_value: int = 2) -> Report:
    """Return both curves up to `longest` generated tokens. ValueError unless that is at least 1."""
    if longest < 1:
        raise ValueError(f"longest={longest} is not possible; give 1 or more generated tokens")
    rows = []
    for name, (settings, way) in curve_lines(preset).items():
        for outputs in sorted({round(longest * point / POINTS) for point in range(POINTS + 1)}):
            memory = inference_memory(settings, way, outputs, bytes_per_value=bytes_per_value)
            rows.append(
                {
                    "preset": preset.name,
                    "method": name,
                    "outputs": outputs,
                    "flops": prefill_work(settings, way, bytes_per_value, outputs).flops,
                    "cache": memory.cache,
                    "memory": memory.decoding,
                }
            )
    columns = (
        Column("method", "method"),
        Column("outputs", "generated"),
        Column("flops", "step without cache, TFLOP", ".2f", 1e-12),
        Column("cache", "cache, GiB", ".2f", 2**-30),
        Column("memory", "memory with cache, GiB", ".2f", 2**-30),
    )
    notes = [
        "Calculated: FLOPs from the modules' shapes, memory as weights, allocated cache and one layer's copy of it.",
        "FastV as a way of ours that keeps its tokens: image tokens only, no output token is dropped.",
        *(note for note in [preset.past_training(longest)] if note),
    ]
    return Report("curve", f"FLOPs and memory over generated tokens (Fig. 1), {preset.name}", columns, rows, notes)
