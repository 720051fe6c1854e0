"""Times of every phase of a generation: vision tower, prefill, steps with and without cache, and the sum of them all.

Baselines run beside it in the same process, on the same weights: transformers' own language model with DynamicCache,
and with StaticCache and torch.compile. On a CPU the ways take turns call by call, so that all see the same load; on an
accelerator they run one after the other, because the caches of all ways at once would not fit.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.report import Column, Report
from dynamic_llava.profile.timing import Timing, time_in_turn
from dynamic_llava.profile.work import work_of
from dynamic_llava.profile.workload import (
    Prompt,
    build_model,
    dense_decoding,
    dense_prefill,
    dense_twin,
    method_of,
    prompts,
    random_ids,
    sparse_decoding,
    sparse_prefill,
)

Call = Callable[[], Any]
STEP_WARMUP = 3
"""Steps before the timed ones: the first compiles, the second records a graph, the third replays it."""


@dataclass(frozen=True)
class Variant:
    """A way and how it is run."""

    way: Way
    compiled: bool = False

    @property
    def engine(self) -> str:
        """What runs it, as tables say it."""
        if self.way == "dense":
            return "StaticCache, compiled" if self.compiled else "DynamicCache"
        return "compiled" if self.compiled else "eager"


EAGER = (Variant("dense"), Variant("image"), Variant("both"))
COMPILED = (Variant("dense", True), Variant("both", True))


@dataclass(frozen=True)
class Effort:
    """How often things are timed."""

    rounds: int = 5
    """Rounds of prefills and of steps without cache; at least 1."""
    step_rounds: int = 32
    """Rounds of cached steps."""
    step_calls: int = 1
    """Steps in a row within a round, without waiting for the device."""

    @classmethod
    def on(cls, device: torch.device) -> "Effort":
        """Return what suits a device."""
        return cls() if device.type == "cpu" else cls(rounds=5, step_rounds=3, step_calls=16)


@dataclass
class Bench:
    """A preset's model with random weights on a device, and transformers' model around the same tensors."""

    preset: Preset
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    model: Any = field(init=False)
    twin: Any = field(init=False)
    prompt: Prompt = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = build_model(self.preset, self.device, self.dtype)
        self.twin = dense_twin(self.model)
        with torch.no_grad():
            self.prompt = prompts(self.model, self.preset)

    def timed(self, makers: Mapping[Any, Callable[[], Call]], *, step: bool = False) -> dict[Any, Timing | None]:
        """Time what the makers return; None for what does not fit into the device's memory."""
        rounds = self.effort.step_rounds if step else self.effort.rounds
        calls = self.effort.step_calls if step else 1
        warmup = STEP_WARMUP if step else 1
        if self.device.type == "cpu":
            return dict(time_in_turn({key: make() for key, make in makers.items()}, self.device, rounds, warmup=warmup))
        found: dict[Any, Timing | None] = {}
        for key, make in makers.items():
            try:
                found |= time_in_turn({key: make()}, self.device, rounds, calls=calls, warmup=warmup)
            except torch.OutOfMemoryError:
                found[key] = None
            torch.accelerator.empty_cache()
        return found

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of weights and caches."""
        return self.dtype.itemsize


def prefill_rows(bench: Bench, ways: Sequence[Way] = ("dense", "both")) -> list[dict[str, Any]]:
    """Time prefills with projected images given; image-only and both are one and the same there."""

    def make(way: Way) -> Call:
        if way == "dense":
            return lambda: dense_prefill(bench.twin, bench.prompt)
        return lambda: sparse_prefill(bench.model, bench.preset, way, bench.prompt)

    with torch.no_grad():
        times = bench.timed({way: partial(make, way) for way in ways})
    return [_row(bench, "prefill", Variant(way), 0, timing) for way, timing in times.items()]


def vision_rows(bench: Bench) -> list[dict[str, Any]]:
    """Time vision tower and projector on one image per row; the same for every way."""
    preset, shape = bench.preset, bench.preset.shape
    side = shape.vision.patch * round(shape.vision.patches**0.5)
    pixels = torch.randn(preset.batch, 3, side, side, device=bench.device, dtype=bench.dtype)
    with torch.no_grad():
        timing = bench.timed({"vision": lambda: lambda: bench.model.model.get_image_features(pixels)})["vision"]
    return [_row(bench, "vision", Variant("dense"), 0, timing) | {"way": "all"}]


def step_rows(bench: Bench, variants: Sequence[Variant], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Time cached steps with so many tokens generated; the caches are opened pre-filled."""
    rows = []
    effort, preset = bench.effort, bench.preset
    steps = STEP_WARMUP + effort.step_rounds * effort.step_calls
    longest = max(lengths)

    def make(variant: Variant, outputs: int) -> Call:
        if variant.way == "dense":
            spare = longest - outputs + steps if variant.compiled else 0  # one length, so that it compiles once
            return dense_decoding(bench.model, bench.twin, preset, outputs, spare).step
        return sparse_decoding(bench.model, preset, variant.way, outputs, compile=variant.compiled).step

    for outputs in lengths:
        times = bench.timed({variant: partial(make, variant, outputs) for variant in variants}, step=True)
        rows += [_row(bench, "step", variant, outputs, timing) for variant, timing in times.items()]
    return rows


def uncached_rows(bench: Bench, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Time steps without cache, which run the whole sequence again, with so many tokens generated."""
    rows, preset = [], bench.preset
    for outputs in lengths:
        with torch.no_grad():
            said_BN = random_ids(bench.model, preset.batch, outputs)
            ids_BN = torch.cat([bench.prompt.ids_BN, said_BN], dim=1)
            embeds_BND = torch.cat([bench.prompt.embeds_BND, bench.model.get_input_embeddings()(said_BN)], dim=1)
            output_BN = torch.arange(ids_BN.shape[1], device=bench.device).expand_as(ids_BN) >= preset.prompt
            given = {"ids": ids_BN, "embeds": embeds_BND, "output": output_BN}
            times = bench.timed({way: partial(_uncached, bench, way, given) for way in ("dense", "both")})
        rows += [_row(bench, "step without cache", Variant(way), outputs, timing) for way, timing in times.items()]
    return rows


def _uncached(bench: Bench, way: Way, given: Mapping[str, Any]) -> Call:
    if way == "dense":
        return lambda: bench.twin(inputs_embeds=given["embeds"], use_cache=False, logits_to_keep=1)
    return lambda: bench.model(
        input_ids=given["ids"],
        image_features=bench.prompt.features_BnD,
        output_mask=given["output"],
        method=method_of(bench.preset, way),
        use_cache=False,
        logits_to_keep=1,
    )


def total_rows(preset: Preset, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield whole generations: vision, prefill and every step, the steps' times joined by straight lines.

    Needs steps timed at 0 tokens and at each of preset.outputs; a way with a gap in between has no total.
    """
    vision = next((row["seconds"] for row in rows if row["phase"] == "vision" and row["seconds"]), 0.0)
    prefills = {row["way"]: row["seconds"] for row in rows if row["phase"] == "prefill"}
    for phase in ("step", "step without cache"):
        kinds = dict.fromkeys((row["way"], row["engine"]) for row in rows if row["phase"] == phase)
        for way, engine in kinds:
            points = sorted(
                (row["outputs"], row["seconds"])
                for row in rows
                if (row["phase"], row["way"], row["engine"]) == (phase, way, engine)
            )
            prefill = prefills.get("dense" if way == "dense" else "both")
            for outputs in preset.outputs:
                seconds = _integral(points, outputs)
                if prefill is not None and seconds is not None:
                    yield {
                        "preset": preset.name,
                        "phase": "total" if phase == "step" else "total without cache",
                        "way": way,
                        "engine": engine,
                        "outputs": outputs,
                        "seconds": vision + prefill + seconds,
                        "tokens_per_second": preset.batch * outputs / (vision + prefill + seconds),
                    }


def _integral(points: Sequence[tuple[int, float | None]], end: int) -> float | None:
    inside = [point for point in points if point[0] <= end]
    if not inside or inside[0][0] != 0 or inside[-1][0] != end or any(seconds is None for _, seconds in inside):
        return None
    pairs = itertools.pairwise(inside)
    return sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairs)  # type: ignore[operator]


def _row(bench: Bench, phase: str, variant: Variant, outputs: int, timing: Timing | None) -> dict[str, Any]:
    work = work_of(phase, bench.preset, variant.way, bench.value_bytes, outputs)
    row = {
        "preset": bench.preset.name,
        "phase": phase,
        "way": variant.way,
        "engine": variant.engine if phase == "step" else "eager",
        "batch": bench.preset.batch,
        "outputs": outputs,
        "seconds": None if timing is None else timing.median,
        "flops": work.flops,
        "bytes": work.bytes,
    }
    if timing is None:
        return row | {"note": "out of memory"}
    spread = {"low": timing.low, "high": timing.high, "calls": timing.calls}
    per_second = {"tokens_per_second": bench.preset.batch / timing.median} if phase.startswith("step") else {}
    return row | spread | per_second


def latency_report(preset: Preset, rows: Sequence[Mapping[str, Any]]) -> Report:
    """Return the rows as a table, with the sums over whole generations."""
    columns = (
        Column("phase", "phase"),
        Column("way", "way"),
        Column("engine", "engine"),
        Column("outputs", "generated"),
        Column("seconds", "median, ms", ".3f", 1e3),
        Column("low", "quartile, ms", ".3f", 1e3),
        Column("high", "quartile, ms", ".3f", 1e3),
        Column("calls", "calls"),
        Column("tokens_per_second", "tokens/s", ".1f"),
        Column("note", ""),
    )
    notes = [
        "dense: transformers' own language model on the same weights. image, both: Dynamic-LLaVA_I and _I|T, "
        "predictors included, exactly the stated rates kept.",
        "prefill: projected images given. total: vision + prefill + steps, each step's time on the line between those "
        "measured.",
        *(note for note in [preset.past_training(preset.outputs[-1])] if note),
    ]
    return Report(
        "latency", f"Times, {preset.name}: {preset.about}", columns, [*rows, *total_rows(preset, rows)], notes
    )
