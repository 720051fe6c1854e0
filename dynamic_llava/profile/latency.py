"""Times of every phase of a generation: vision tower, prefill, steps with and without cache, and the sum of them all.

Baselines run beside it in the same process, on the same weights: transformers' own language model with DynamicCache,
and with StaticCache and torch.compile. On a CPU the ways take turns call by call, so that all see the same load; on an
accelerator they run one after the other, because the caches of all ways at once would not fit, and each row is yielded
as soon as it is measured.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria

from dynamic_llava.methods import describe_method
from dynamic_llava.profile.measuring import (
    LIMIT_COLUMNS,
    DeviceLimits,
    Timing,
    attempt,
    describe,
    limit_notes,
    summary,
    synchronize,
    time_in_turn,
    with_limit,
    work_of,
)
from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.results import Column, Report, Rows
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
    """One way of running a preset, eager or compiled."""

    way: Way
    compiled: bool = False

    @property
    def engine(self) -> str:
        """Name in tables of what runs the step: the cache, and whether it is compiled."""
        if self.way == "dense":
            return "StaticCache, compiled" if self.compiled else "DynamicCache"
        return "compiled" if self.compiled else "eager"


EAGER = (Variant("dense"), Variant("image"), Variant("both"))
COMPILED = (Variant("dense", True), Variant("both", True))


@dataclass(frozen=True)
class Effort:
    """Numbers of rounds and calls of each kind of timing."""

    rounds: int = 5
    """Rounds of prefills and of steps without cache; at least 1."""
    step_rounds: int = 32
    """Rounds of cached steps."""
    step_calls: int = 1
    """Steps in a row within a round, without waiting for the device."""
    by_turns: bool = True
    """Whether the ways take turns, call by call; if not, one comes after the other and each is reported at once."""

    @classmethod
    def on(cls, device: torch.device) -> "Effort":
        """Return what suits a device."""
        return cls() if device.type == "cpu" else cls(rounds=5, step_rounds=3, step_calls=16, by_turns=False)


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

    def timed(
        self, makers: Mapping[Any, Callable[[], Call]], *, step: bool = False
    ) -> Iterator[tuple[Any, Timing | Exception]]:
        """Time what the makers return; what cannot run gives its exception, and where all take turns it is raised."""
        rounds = self.effort.step_rounds if step else self.effort.rounds
        calls = self.effort.step_calls if step else 1
        warmup = STEP_WARMUP if step else 1
        if self.effort.by_turns:
            timed = {key: make() for key, make in makers.items()}
            yield from time_in_turn(timed, self.device, rounds, calls=calls, warmup=warmup).items()
            return
        for key, make in makers.items():
            yield key, attempt(key, partial(self._alone, make, rounds, calls, warmup))
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()

    def _alone(self, make: Callable[[], Call], rounds: int, calls: int, warmup: int) -> Timing:
        begun = time.perf_counter()
        call = make()
        for _ in range(warmup):
            call()
        synchronize(self.device)
        ready = time.perf_counter() - begun
        timing = time_in_turn({"call": call}, self.device, rounds, calls=calls, warmup=0)["call"]
        return replace(timing, ready=ready)

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of weights and caches."""
        return self.dtype.itemsize


def prefill_rows(bench: Bench, ways: Sequence[Way] = ("dense", "both")) -> Rows:
    """Time prefills with projected images given; image-only and both are one and the same there."""

    def make(way: Way) -> Call:
        if way == "dense":
            return lambda: dense_prefill(bench.twin, bench.prompt)
        return lambda: sparse_prefill(bench.model, bench.preset, way, bench.prompt)

    return _rows(bench, "prefill", 0, {Variant(way): partial(make, way) for way in ways})


def vision_rows(bench: Bench) -> Rows:
    """Time vision tower and projector on one image per row; the same for every way."""
    preset, shape = bench.preset, bench.preset.shape
    side = shape.vision.patch * round(shape.vision.patches**0.5)
    pixels = torch.randn(preset.batch, 3, side, side, device=bench.device, dtype=bench.dtype)
    encode = partial(bench.model.model.get_image_features, pixels)
    for row in _rows(bench, "vision", 0, {Variant("dense"): lambda: encode}):
        yield row | {"way": "all"}


def step_rows(bench: Bench, variants: Sequence[Variant], lengths: Sequence[int]) -> Rows:
    """Time cached steps with so many tokens generated; the caches are opened pre-filled.

    A StaticCache has room for the tokens that are fed to it and no more, because attention reads all of it.
    """
    for outputs in lengths:
        yield from _rows(
            bench, "step", outputs, {variant: partial(step_call, bench, variant, outputs) for variant in variants}
        )


def step_call(bench: Bench, variant: Variant, outputs: int) -> Call:
    """Return a function that feeds one token to every row of a generation with so many tokens behind it."""
    preset, steps = bench.preset, STEP_WARMUP + bench.effort.step_rounds * bench.effort.step_calls
    if variant.way == "dense":
        return dense_decoding(bench.model, bench.twin, preset, outputs, steps if variant.compiled else 0).step
    return sparse_decoding(bench.model, preset, variant.way, outputs, compile=variant.compiled).step


def uncached_rows(bench: Bench, lengths: Sequence[int]) -> Rows:
    """Time steps without cache, which run the whole sequence again, with so many tokens generated."""
    preset = bench.preset
    for outputs in lengths:
        with torch.no_grad():
            said_BN = random_ids(bench.model, preset.batch, outputs)
            ids_BN = torch.cat([bench.prompt.ids_BN, said_BN], dim=1)
            embeds_BND = torch.cat([bench.prompt.embeds_BND, bench.model.get_input_embeddings()(said_BN)], dim=1)
        output_BN = torch.arange(ids_BN.shape[1], device=bench.device).expand_as(ids_BN) >= preset.prompt
        given = {"ids": ids_BN, "embeds": embeds_BND, "output": output_BN}
        ways: tuple[Way, ...] = ("dense", "both")
        makers = {Variant(way): partial(_uncached, bench, way, given) for way in ways}
        yield from _rows(bench, "step without cache", outputs, makers)


def generate_rows(bench: Bench, variants: Sequence[Variant], tokens: int) -> Rows:
    """Time the tokens of a generate() after its first one, all bookkeeping included; tokens per second are a mean.

    Dense generations are transformers' own, with DynamicCache or with its StaticCache, which it compiles itself on an
    accelerator and nowhere else. The first call, which compiles, is not timed.
    """
    for variant in variants:
        row = _row(bench, "generate", variant, tokens, attempt(variant, partial(_generation, bench, variant, tokens)))
        static = variant == Variant("dense", True)
        yield row | {"engine": "StaticCache, transformers' own compilation" if static else variant.engine}


class _Clock(StoppingCriteria):
    """Ends nothing, and notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ticks = device, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)  # generate() reads on the host whether rows have ended, so it waits anyway
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generation(bench: Bench, variant: Variant, tokens: int) -> Timing:
    prompt, sizes = bench.prompt, {"max_new_tokens": tokens + 1, "do_sample": False}
    mask_BN = torch.ones_like(prompt.ids_BN)
    for model in (bench.model, bench.twin):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    clock = _Clock(bench.device)
    for _ in range(2):
        clock.ticks.clear()
        if variant.way == "dense":
            cache = {"cache_implementation": "static"} if variant.compiled else {}
            given = {"inputs_embeds": prompt.embeds_BND, "attention_mask": mask_BN, **cache}
            bench.twin.generate(**given, **sizes, stopping_criteria=[clock])
        else:
            given = {"input_ids": prompt.ids_BN, "attention_mask": mask_BN, "image_features": prompt.images}
            method = {"method": method_of(bench.preset, variant.way), "compile": variant.compiled}
            bench.model.generate(**given, **sizes, **method, stopping_criteria=[clock])
    return summary([later - earlier for earlier, later in itertools.pairwise(clock.ticks)])


def _uncached(bench: Bench, way: Way, given: Mapping[str, Any]) -> Call:
    if way == "dense":
        return lambda: bench.twin(inputs_embeds=given["embeds"], use_cache=False, logits_to_keep=1)
    return lambda: bench.model(
        input_ids=given["ids"],
        image_features=bench.prompt.images,
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


def _rows(bench: Bench, phase: str, outputs: int, makers: Mapping[Variant, Callable[[], Call]]) -> Rows:
    with torch.no_grad():
        for variant, timing in bench.timed(makers, step=phase == "step"):
            yield _row(bench, phase, variant, outputs, timing)


def _row(bench: Bench, phase: str, variant: Variant, outputs: int, timing: Timing | Exception) -> dict[str, Any]:
    # A generation's bytes are those of a step in its middle.
    at = outputs // 2 if phase == "generate" else outputs
    work = work_of("step" if phase == "generate" else phase, bench.preset, variant.way, bench.value_bytes, at)
    row = {
        "preset": bench.preset.name,
        "phase": phase,
        "way": variant.way,
        "engine": variant.engine if phase == "step" else "eager",
        "batch": bench.preset.batch,
        "outputs": outputs,
        "seconds": None,
        "flops": work.flops,
        "bytes": work.bytes,
    }
    if isinstance(timing, torch.OutOfMemoryError):
        return row | {"note": "out of memory"}
    if isinstance(timing, Exception):
        return row | {"note": "failed", "failed": describe(timing)}
    measured = {"seconds": timing.median, "low": timing.low, "high": timing.high, "calls": timing.calls}
    if timing.ready is not None:
        measured["ready"] = timing.ready
    if phase.startswith(("step", "generate")):
        measured["tokens_per_second"] = bench.preset.batch / timing.mean
    return row | measured


def failures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what could not be timed for another reason than memory, and why."""
    return [f"{row['phase']}, {row['way']}, {row['engine']}: {row['failed']}" for row in rows if "failed" in row]


def latency_report(preset: Preset, rows: Sequence[Mapping[str, Any]], limits: DeviceLimits | None = None) -> Report:
    """Return the rows as a table, with the sums over whole generations, and the device's limits if they are given."""
    columns = [
        Column("phase", "phase"),
        Column("way", "way"),
        Column("engine", "engine"),
        Column("outputs", "generated"),
        Column("seconds", "median, ms", ".3f", 1e3),
        Column("low", "quartile, ms", ".3f", 1e3),
        Column("high", "quartile, ms", ".3f", 1e3),
        Column("calls", "calls"),
        Column("tokens_per_second", "tokens/s", ".1f"),
    ]
    named = (
        "image, both: Dynamic-LLaVA_I and _I|T, predictors included, exactly the stated rates kept."
        if preset.method is None
        else f"The other rows: {describe_method(preset.method)}."
    )
    notes = [
        f"dense: transformers' own language model on the same weights. {named}",
        "prefill: projected images given. total: vision + prefill + steps, each step's time on the line between those "
        "measured.",
        *(note for note in [preset.past_training(preset.outputs[-1])] if note),
    ]
    whole = [*rows, *total_rows(preset, rows)]
    if limits is not None:
        columns += LIMIT_COLUMNS
        notes += limit_notes(limits)
        whole = [with_limit(row, limits) for row in whole]
    columns += [Column("ready", "s to the first timed call", ".1f"), Column("note", "")]
    return Report("latency", f"Times, {preset.name}: {preset.about}", columns, whole, notes)
