"""What goals are set for: ratios and shares that follow from rows of times, and what is looked at for its own sake.

Each function returns numbers by name; `summary.py` says what they should be. Ratios of what took turns in one
process hold on a busy machine where times do not, because both sides of a ratio see the same load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dynamic_llava.costs import DevicePeak, device_peak
from dynamic_llava.model import cache_of
from dynamic_llava.profile.latency import Bench
from dynamic_llava.profile.measuring import step_work, time_in_turn
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.workload import (
    Decoding,
    build_model,
    method_of,
    prompts,
    random_ids,
    sparse_decoding,
    sparse_prefill,
)


def step_values(preset: Preset, rows: Sequence[Mapping[str, Any]], device: str) -> dict[str, float]:
    """Return what goals say about cached steps, by preset and generated tokens, from as many rows as there are yet.

    Both dense baselines count, DynamicCache and the compiled StaticCache: what is held against "dense" is held against
    the faster of them, once both are there. Shares of a device's peak only where its data sheet is known.
    """
    found: dict[str, float] = {}
    for outputs in dict.fromkeys(row["outputs"] for row in rows if row["phase"] == "step"):
        steps = {
            (row["way"], row["engine"]): row
            for row in rows
            if row["phase"] == "step" and row["outputs"] == outputs and row["seconds"]
        }
        own = _step_values(steps, device_peak(device))
        found |= {f"step_{preset.name}_{outputs}_{name}": value for name, value in own.items()}
    return found


def _step_values(steps: Mapping[tuple[str, str], Mapping[str, Any]], peak: DevicePeak | None) -> dict[str, float]:
    eager, compiled, image, dynamic, static = (
        steps.get(key)
        for key in (
            ("both", "eager"),
            ("both", "compiled"),
            ("image", "eager"),
            ("dense", "DynamicCache"),
            ("dense", "StaticCache, compiled"),
        )
    )
    found: dict[str, float] = {}
    for name, ours, theirs in (
        ("both_over_image", eager, image),
        ("eager_over_dynamic", eager, dynamic),
        ("compiled_over_static", compiled, static),
    ):
        if ours and theirs:
            found[name] = ours["seconds"] / theirs["seconds"]
    if compiled:
        found["ms"] = 1e3 * compiled["seconds"]
        if peak is not None:
            found["bandwidth"] = compiled["bytes"] / compiled["seconds"] / (peak.terabytes * 1e12)
    if eager and compiled and dynamic and static:
        ours, theirs = (min(pair, key=lambda row: row["seconds"]) for pair in ((eager, compiled), (dynamic, static)))
        found["both_over_dense"] = ours["seconds"] / theirs["seconds"]
        found["speedup"] = theirs["seconds"] / compiled["seconds"] / (theirs["bytes"] / compiled["bytes"])
    return found


def prefill_values(preset: Preset, rows: Sequence[Mapping[str, Any]], device: str) -> dict[str, float]:
    """Return a prefill's share of the device's peak for each way, and its time over a dense one's by that of FLOPs."""
    peak, name = device_peak(device), f"prefill_{preset.name}"
    by_way = {row["way"]: row for row in rows if row["phase"] == "prefill" and row["seconds"]}
    found: dict[str, float] = {}
    if peak is not None:
        for way, row in by_way.items():
            found[f"{name}_{way}_mfu"] = row["flops"] / row["seconds"] / (peak.tflops * 1e12)
    if len(by_way) == 2:
        both, dense = by_way["both"], by_way["dense"]
        found[f"{name}_over_flops"] = both["seconds"] / dense["seconds"] / (both["flops"] / dense["flops"])
    return found


def dropped_tokens_ratio(bench: Bench) -> dict[str, float]:
    """Return a step's time with as many kept tokens and twice the generated ones, over its usual time.

    The layers below the sparse one see every token, so a little growth is the method's own: the ratio of times is
    divided by the ratio of the bytes that the two steps have to read.
    """
    preset, outputs = bench.preset, bench.preset.outputs[-1]
    longer = replace(preset, output_keep_rate=preset.output_keep_rate / 2)
    timed = {
        "usual": sparse_decoding(bench.model, preset, "both", outputs).step,
        "more dropped": sparse_decoding(bench.model, longer, "both", 2 * outputs).step,
    }
    times = time_in_turn(timed, bench.device, bench.effort.step_rounds, calls=bench.effort.step_calls, warmup=2)
    usual = step_work(preset, "both", bench.value_bytes, outputs).bytes
    more = step_work(longer, "both", bench.value_bytes, 2 * outputs).bytes
    return {"step_more_dropped": times["more dropped"].median / times["usual"].median / (more / usual)}


@torch.no_grad()
def compiled_decoding(preset: Preset, device: torch.device, dtype: torch.dtype, steps: int = 64) -> dict[str, float]:
    """Return how much faster a compiled step is, its graphs and breaks, and whether the eager one says the same tokens.

    Needs a C++ compiler on a CPU.
    """
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = build_model(preset, device, dtype)
    prompt = prompts(model, preset)
    torch._dynamo.reset()
    counters.clear()
    said = {}
    for compile in (False, True):
        opened = sparse_prefill(model, preset, "both", prompt)
        first_B1 = opened.logits[:, -1].argmax(-1, keepdim=True)
        decoding = Decoding(model, first_B1, cache_of(opened), method=method_of(preset, "both"), compile=compile)
        said[compile] = [_said(decoding) for _ in range(steps)]
    found = {
        "compiled_graphs": float(counters["stats"]["unique_graphs"]),
        "compiled_breaks": float(sum(counters["graph_break"].values())),
        "compiled_same_tokens": float(all(map(torch.equal, said[False], said[True]))),
    }
    timed = {compile: sparse_decoding(model, preset, "both", steps, compile=compile).step for compile in (False, True)}
    times = time_in_turn(timed, device, 48, warmup=3)
    return found | {"compiled_speedup": times[False].median / times[True].median}


def _said(decoding: Decoding) -> torch.Tensor:
    decoding.step()
    return decoding.token_B1


@torch.no_grad()
def generated_bytes(preset: Preset, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Generate preset.outputs[-1] tokens for real, rows keeping different shares of them; return bytes over their need.

    The need is batch x (longest row, rounded up to a block) in both groups of layers; at each of preset.outputs.
    """
    torch.manual_seed(0)
    model = build_model(preset, device, dtype)
    opened = sparse_prefill(model, preset, "both", prompts(model, preset))
    cache = cache_of(opened)
    first_B1 = random_ids(model, preset.batch, 1)
    # Rows keep from half to all of what the preset says, so that they differ and the longest one counts.
    shares_B = torch.linspace(0.5, 1.0, preset.batch, device=device)
    decoding = Decoding(model, first_B1, cache, method=method_of(preset, "both"))
    found, block = {}, model.config.sparsity.cache_block
    for step in range(preset.outputs[-1]):
        wanted_B = torch.rand(preset.batch, device=device) < shares_B * preset.output_keep_rate
        decoding.switches["keep_mask"] = wanted_B[:, None]
        decoding.step()
        if step + 1 in preset.outputs:
            found[f"cache_bytes_{step + 1}"] = cache.allocated_bytes() / _needed_bytes(cache, preset, dtype, block)
    return found


def _needed_bytes(cache: Any, preset: Preset, dtype: torch.dtype, block: int) -> int:
    decoder, total = preset.shape.decoder, 0
    for slots, layers in ((cache.dense, preset.sparse_layer), (cache.sparse, decoder.layers - preset.sparse_layer)):
        longest = -(-int(slots.open_lengths().max()) // block) * block
        total += layers * preset.batch * longest * 2 * decoder.kv_width * dtype.itemsize
    return total
