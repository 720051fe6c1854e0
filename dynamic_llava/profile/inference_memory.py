"""What a generation holds in memory: weights, keys and values, and what a prefill or a step needs while it runs.

The calculation is exact in weights and cache. Passing memory is what the largest moment of one layer needs, which is
the gated MLP: its input, the residual, what entered the layer, and three products. A cache that grows copies one
layer's keys: transformers' DynamicCache at every step, the admission cache when a block is full. Left out: what kernels
use inside themselves, the vision tower's passing activations, the accelerator's context, its allocator's fragments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import kv_bytes, parameter_counts
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.profile.measuring import Peak, peak_memory
from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.results import Column, Report
from dynamic_llava.profile.workload import (
    Decoding,
    dense_decoding,
    dense_prefill,
    prompts,
    sparse_decoding,
    sparse_prefill,
)


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of a generation of one batch, with `outputs` tokens generated."""

    weights: int
    """Vision tower and projector included, and the predictors where they are used."""
    cache: int
    """Keys and values at the end; slots that are allocated and not yet filled count."""
    prefill: int
    """Bytes of everything at the prefill's highest moment."""
    decoding: int
    """Bytes of everything in the last step."""

    @property
    def total(self) -> int:
        """The most that is ever needed."""
        return max(self.prefill, self.decoding)


def inference_memory(
    preset: Preset, way: Way, outputs: int, *, bytes_per_value: int = 2, sparsity: SparsityConfig | None = None
) -> InferenceMemory:
    """Return the memory of generating `outputs` tokens for every row of the preset's batch."""
    settings = sparsity if sparsity is not None else SparsityConfig()
    decoder, batch = preset.shape.decoder, preset.batch
    learned = learned_costs(settings, decoder.hidden)
    counts = parameter_counts(preset.shape, learned)
    unused = set() if way != "dense" and preset.method is None else set(learned)
    weights = bytes_per_value * sum(count for part, count in counts.items() if part not in unused)
    cache = cache_bytes(preset, way, outputs, bytes_per_value=bytes_per_value, block=settings.cache_block)
    prefill = weights + _prefill_bytes(preset, way, settings, bytes_per_value)
    grows = batch * max(preset.held(way, outputs)) * decoder.kv_width * bytes_per_value
    return InferenceMemory(weights, cache, prefill, weights + cache + grows)


def _prefill_bytes(preset: Preset, way: Way, settings: SparsityConfig, bytes_per_value: int) -> int:
    """Highest bytes beyond the weights: in the last layer, and sparsely in an early layer or in the image predictor."""
    decoder, batch, prompt = preset.shape.decoder, preset.batch, preset.prompt
    sizes = {"bytes_per_value": bytes_per_value, "batch": batch}
    mlp = 3 * decoder.hidden + 3 * decoder.intermediate
    values = bytes_per_value * batch
    seen, held = preset.seen(way), preset.held(way)
    embedded = values * prompt * decoder.hidden
    moments = [  # in each layer: earlier ones have evicted, the prompt's hidden states are kept where tokens are packed
        kv_bytes(replace(decoder, layers=layer + 1), [*held[:layer], tokens], **sizes)
        + values * (tokens * mlp + (tokens < prompt) * prompt * decoder.hidden)
        for layer, tokens in enumerate(seen)
    ]
    if way != "dense" and preset.method is None:
        early = kv_bytes(decoder, prompt, kept=0, sparse_layer=preset.sparse_layer, **sizes)
        predictor = 2 * decoder.hidden + 2 * settings.predictor_mlp + 4 * settings.predictor_width
        moments.append(early + values * (prompt * decoder.hidden + preset.shape.tokens_per_image * predictor))
    return embedded + max(moments)


def cache_bytes(preset: Preset, way: Way, outputs: int, *, bytes_per_value: int = 2, block: int = 64) -> int:
    """Return the bytes that keys and values take after `outputs` tokens, with the slot of the next token.

    The dense baseline holds exactly its tokens; the admission cache holds whole blocks once it has grown.
    """
    decoder, held = preset.shape.decoder, preset.held(way, outputs)
    sizes = {"bytes_per_value": bytes_per_value, "batch": preset.batch}
    evicts = way != "dense" and preset.method is not None and preset.method.evicts

    def slots(filled: int) -> int:
        if way == "dense" or not outputs:
            return filled
        return -(-(filled + 1 + evicts * block) // block) * block

    allocated = [slots(filled) for filled in held]
    # What a method sees of each stored token lies beside its key and value: float32, but for these.
    beside = sum({"place": 8, "output": 1}.get(kind, 4) for kind in preset.method.evict_sees) if evicts else 0
    return kv_bytes(decoder, allocated, **sizes) + preset.batch * decoder.kv_heads * beside * sum(allocated)


def measured_memory(model: Any, twin: Any, preset: Preset, way: Way, outputs: int) -> dict[str, Peak]:
    """Return the measured peaks of a prefill, and of the last steps of a generation of `outputs` tokens."""
    prompt = prompts(model, preset)
    decides = way != "dense" and preset.method is None
    weights = [parameter for name, parameter in model.named_parameters() if decides or "_predictor" not in name]
    held = [*weights, prompt.embeds_BND] if way == "dense" else [*weights, prompt.features_BnD]

    steps = min(outputs, model.config.sparsity.cache_block + 1)  # enough for the cache to grow once

    def prefill(_: Any) -> None:
        if way == "dense":
            dense_prefill(twin, prompt)
        else:
            sparse_prefill(model, preset, way, prompt)

    def open_cache() -> Decoding:
        if way == "dense":
            return dense_decoding(model, twin, preset, outputs - steps)
        return sparse_decoding(model, preset, way, outputs - steps)

    def decode(decoding: Decoding) -> None:
        for _ in range(steps):
            decoding.step()

    with torch.no_grad():
        return {
            "prefill": peak_memory(lambda: None, prefill, model.device, held),
            "decoding": peak_memory(open_cache, decode, model.device, weights),
        }


def memory_report(
    preset: Preset,
    ways: Sequence[Way],
    bytes_per_value: int,
    measure: Callable[[Way, int], dict[str, Peak]] | None = None,
) -> Report:
    """Return calculated memory of each way and length, and beside it what `measure` finds, if given."""
    rows, how = [], set()
    for outputs in preset.outputs:
        for way in ways:
            found = inference_memory(preset, way, outputs, bytes_per_value=bytes_per_value)
            row = {
                "preset": preset.name,
                "way": way,
                "batch": preset.batch,
                "outputs": outputs,
                "weights": found.weights,
                "cache": found.cache,
                "prefill": found.prefill,
                "decoding": found.decoding,
                "total": found.total,
            }
            if measure is not None:
                try:
                    peaks = measure(way, outputs)
                except torch.OutOfMemoryError:
                    row["measured"] = "out of memory"
                else:
                    how |= {peak.how for peak in peaks.values()}
                    row |= {f"measured_{name}": peak.bytes for name, peak in peaks.items()}
                    row["measured"] = max(peak.bytes for peak in peaks.values())
            rows.append(row)
    titles = {
        "weights": "weights",
        "cache": "cache",
        "prefill": "prefill peak",
        "decoding": "last step",
        "total": "peak",
    }
    columns = [Column("way", "way"), Column("outputs", "generated")]
    columns += [Column(key, f"{title}, GiB", ".3f", 2**-30) for key, title in titles.items()]
    notes = ["The cache is what is allocated: whole blocks in the sparse ways, exactly the tokens in the dense one."]
    if measure is not None:
        columns.append(Column("measured", "measured peak, GiB", ".3f", 2**-30))
        notes.append(
            f"Measured: {', '.join(sorted(how)) or 'nothing fitted'}; prefill and last steps, each from a reset."
        )
    notes += [note for note in [preset.past_training(preset.outputs[-1])] if note]
    return Report("memory", f"Memory of a generation, {preset.name}: {preset.about}", columns, rows, notes)
