"""The paper's tables and curves, recomputed beside what it prints; nothing is run.

FLOPs of Tables 3 and 10 (Eq. 13 as printed, and counted from the modules' shapes), the token statistics of Table 8, the
curves of Fig. 1, and the measured times and memory of Tables 4 and 14 beside the limits of their device, one A100 80G.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dynamic_llava.costs import (
    DEVICE_PEAKS,
    LLAVA_7B,
    LLAVA_13B,
    DecoderShape,
    average_tokens,
    flops_exact,
    flops_paper,
    kv_bytes,
)
from dynamic_llava.methods import describe_method
from dynamic_llava.profile.inference_memory import inference_memory
from dynamic_llava.profile.measuring import prefill_work, step_work, vision_work
from dynamic_llava.profile.presets import PRESETS, Preset, Way
from dynamic_llava.profile.results import Column, Report


@dataclass(frozen=True)
class Table10Row:
    """A row of Table 10: image tokens that the early and the late layers see."""

    model: str
    method: str
    shape: DecoderShape
    tokens: int
    printed: str
    """TFLOP in Table 10."""
    kept: int | None = None
    sparse_layer: int = 0


def _table_10() -> list[Table10Row]:
    def rows(model: str, shape: DecoderShape, *printed: str) -> list[Table10Row]:
        """Return one size's rows, in the order of Table 10."""
        given = (
            ("LLaVA-1.5", 576, None, 0),
            ("PruMerge+", 146, None, 0),
            ("FastV", 576, 144, 3),
            ("VoCo-LLaMA", 128, None, 0),
            ("HiRED", 115, None, 0),
            ("Dynamic-LLaVA", 576, 115, 2),
            ("TokenPacker 144", 144, None, 0),
            ("TokenPacker 64", 64, None, 0),
            ("TokenPacker + FastV", 144, 72, 3),
            ("TokenPacker + Dynamic-LLaVA", 144, 57, 2),
        )
        return [
            Table10Row(model, method, shape, tokens, value, kept, layer)
            for (method, tokens, kept, layer), value in zip(given, printed, strict=True)
        ]

    small = ("10.1", "2.5", "3.2", "2.2", "2.07", "2.5", "2.5", "1.1", "1.4", "1.1")
    large = ("19.6", "4.9", "6.0", "4.3", "3.9", "4.7", "4.9", "2.2", "2.6", "2.1")
    return rows("7B", LLAVA_7B, *small) + rows("13B", LLAVA_13B, *large)


TABLE_10 = _table_10()
TABLE_3 = (
    ("7B", "LLaVA-1.5", LLAVA_7B, 159, None, "2.75", "103"),
    ("7B", "Dynamic-LLaVA_I|T", LLAVA_7B, 159, 84, "1.52", "63"),
    ("13B", "LLaVA-1.5", LLAVA_13B, 159, None, "5.36", "149"),
)
"""LVIS-VQA (single-round): model, method, shape, output tokens, kept ones, printed TFLOP and M of the cache."""


def prefill_report() -> Report:
    """Return Table 10: image tokens only, batch 1; values that the paper prints differently are named."""
    rows, differing = [], []
    for row in TABLE_10:
        groups = {"kept": row.kept, "sparse_layer": row.sparse_layer}
        paper = flops_paper(row.tokens, row.shape.hidden, row.shape.layers, **groups)
        kept = row.tokens if row.kept is None else row.kept
        decimals = len(row.printed.split(".")[1])
        agrees = f"{paper / 1e12:.{decimals}f}" == row.printed
        if not agrees:
            differing.append(f"{row.method} {row.model}: {row.printed} printed, {paper / 1e12:.2f} by Eq. 13")
        rows.append(
            {
                "model": row.model,
                "method": row.method,
                "tokens": row.tokens,
                "kept": row.kept,
                "average_tokens": average_tokens(row.tokens, kept, row.shape.layers, row.sparse_layer),
                "printed_tflop": row.printed,
                "flops_paper": paper,
                "flops_exact": flops_exact(row.tokens, row.shape, **groups),
                "flops_causal": flops_exact(row.tokens, row.shape, causal=True, **groups),
                "agrees": agrees,
            }
        )
    columns = (
        Column("method", "method"),
        Column("model", "model"),
        Column("tokens", "tokens"),
        Column("kept", "kept"),
        Column("average_tokens", "average per layer", ".1f"),
        Column("printed_tflop", "Table 10, TFLOP"),
        Column("flops_paper", "paper (Eq. 13)", ".4f", 1e-12),
        Column("flops_exact", "exact", ".4f", 1e-12),
        Column("flops_causal", "exact, causal", ".4f", 1e-12),
    )
    notes = (
        f"Printed differently in the paper: {'; '.join(differing)}. All other {len(rows) - len(differing)} agree.",
        "paper: 32 N C^2 + 4 N^2 C in each layer. exact: from the modules' shapes, two per multiply-add, full N x N "
        "attention; causal: visible pairs only.",
    )
    return Report("flops", "FLOPs of the image tokens in one prefill (Table 10), batch 1", columns, rows, notes)


def decoding_report() -> Report:
    """Return the decoding columns of Table 3: Eq. 13 on the output tokens of one pass, and their keys and values."""
    rows = []
    for model, method, shape, tokens, kept, printed, megabytes in TABLE_3:
        groups = {"kept": kept, "sparse_layer": 2}
        rows.append(
            {
                "model": model,
                "method": method,
                "tokens": tokens,
                "kept": kept,
                "printed_tflop": printed,
                "flops_paper": flops_paper(tokens, shape.hidden, shape.layers, **groups),
                "flops_exact": flops_exact(tokens, shape, **groups),
                "printed_mega": megabytes,
                "kv_bytes": kv_bytes(shape, tokens, **groups),
            }
        )
    columns = (
        Column("method", "method"),
        Column("model", "model"),
        Column("tokens", "output"),
        Column("kept", "kept"),
        Column("printed_tflop", "Table 3, TFLOP"),
        Column("flops_paper", "paper (Eq. 13)", ".3f", 1e-12),
        Column("flops_exact", "exact", ".3f", 1e-12),
        Column("printed_mega", "Table 3, M"),
        Column("kv_bytes", "keys and values, MiB", ".1f", 2**-20),
    )
    notes = (
        "The paper's values are means over its samples, these are at the mean length; its M is what the device held.",
    )
    return Report("flops", "Output tokens of LVIS-VQA, single-round (Table 3)", columns, rows, notes)


IMAGE, IMAGE_FASTV, IMAGE_KEPT = 576, 144, 115
FASTV_LAYER, SPARSE_LAYER = 3, 2


@dataclass(frozen=True)
class Benchmark:
    """A column of Table 8: average lengths, and the totals that the paper prints."""

    name: str
    text: int
    output: int
    output_kept: int
    """Output tokens that take part: all of a short answer."""
    printed: tuple[int, int, int]
    """Totals of LLaVA-1.5, FastV (k = 3, r = 0.75) and Dynamic-LLaVA_I|T, 13B."""


TABLE_8 = (
    Benchmark("VQAv2", 8, 2, 2, (586, 154, 125)),
    Benchmark("VizWiz", 10, 3, 3, (589, 157, 128)),
    Benchmark("SciQA", 15, 6, 6, (597, 165, 136)),
    Benchmark("LVIS-VQA (single)", 56, 159, 84, (794, 359, 255)),
    Benchmark("LVIS-VQA (multi)", 205, 351, 181, (1132, 700, 501)),
    Benchmark("ShareGPT4V-VQA (single)", 51, 1555, 763, (2182, 1750, 929)),
)


def tokens_report() -> Report:
    """Return Table 8 recomputed, with the mean over all layers beside what the paper counts."""
    rows, differing = [], []
    layers = LLAVA_13B.layers
    for benchmark in TABLE_8:
        rest = benchmark.text + benchmark.output
        totals = {
            "LLaVA-1.5": (IMAGE + rest, 0),
            "FastV": (IMAGE_FASTV + rest, FASTV_LAYER),
            "Dynamic-LLaVA_I|T": (IMAGE_KEPT + benchmark.text + benchmark.output_kept, SPARSE_LAYER),
        }
        dense = IMAGE + rest
        for (method, (total, layer)), printed in zip(totals.items(), benchmark.printed, strict=True):
            if total != printed:
                differing.append(f"{method} on {benchmark.name}: {printed} printed, {total} by its own lengths")
            rows.append(
                {
                    "benchmark": benchmark.name,
                    "method": method,
                    "image": IMAGE,
                    "text": benchmark.text,
                    "output": benchmark.output,
                    "printed": printed,
                    "computing": total,
                    "change": total / dense - 1,
                    "average_tokens": average_tokens(dense, total, layers, layer),
                    "agrees": total == printed,
                }
            )
    columns = (
        Column("benchmark", "benchmark"),
        Column("method", "method, 13B"),
        Column("image", "image"),
        Column("text", "text"),
        Column("output", "output"),
        Column("printed", "Table 8"),
        Column("computing", "computing"),
        Column("change", "change", ".0%"),
        Column("average_tokens", "average per layer", ".1f"),
    )
    notes = (
        f"Printed differently in the paper: {'; '.join(differing)}. All other {len(rows) - len(differing)} agree.",
        "Table 8 counts what layers from the sparse one on see (ours: layer 2, FastV: 3). The mean over all 40 layers "
        "is higher, because the first ones see every token.",
        "Output tokens that stay follow from Table 8's totals: 84 of 159, 181 of 351, 763 of 1555.",
    )
    return Report("tokens", "Tokens in the computation, prefill and decoding (Table 8)", columns, rows, notes)


POINTS = 20
"""Steps of the grid between 0 and the longest answer."""


def curve_lines(preset: Preset) -> dict[str, tuple[Preset, Way]]:
    """Return the lines of Fig. 1: dense, FastV (k = 3, r = 0.75: image tokens only), Dynamic-LLaVA_I|T.

    Where the preset has a method of its own, that and the dense one.
    """
    if preset.method is not None:
        return {"LLaVA-1.5": (preset, "dense"), describe_method(preset.method): (preset, "both")}
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
    fastv = "FastV as a way of ours that keeps its tokens: image tokens only, no output token is dropped."
    notes = [
        "Calculated: FLOPs from the modules' shapes, memory as weights, allocated cache and one layer's copy of it.",
        *([fastv] if preset.method is None else []),
        *(note for note in [preset.past_training(longest)] if note),
    ]
    return Report("curve", f"FLOPs and memory over generated tokens (Fig. 1), {preset.name}", columns, rows, notes)


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


def _paper_limit(preset: Preset, measure: str, outputs: int, way: Way) -> float:
    if measure.startswith("memory"):
        return inference_memory(preset, way, outputs).total / 2**30
    if measure.startswith("without"):
        return uncached_limit(preset, way, outputs)
    seconds = prefill_limit(preset, way) if measure.startswith("prefill") else step_limit(preset, way, outputs)
    return seconds * (1e3 if measure.endswith("ms") else 1)


def _paper_rows() -> Iterator[dict[str, Any]]:
    for name, measure, outputs, way, printed in PRINTED:
        limit = _paper_limit(PRESETS[name], measure, outputs, way)
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
    return Report("paper", "The paper's times and memory, and what an A100 allows", columns, list(_paper_rows()), notes)
