"""How long a piece of work takes, the most memory that it holds at once, and the least that the device would need.

Time: warm-up, medians, spread, and a device that has finished before the clock is read. Memory: an accelerator's own
count, and on a CPU the bytes of all tensors that are alive. The least: FLOPs and bytes of each phase of a preset,
against the rates that the device reached in the same run.
"""

import logging
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import (
    decode_step_bytes,
    flops_decode_step,
    head_flops,
    predictor_flops,
    prefill_flops,
    weight_bytes,
)
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.profile.presets import Preset, Way
from dynamic_llava.profile.results import Column
from dynamic_llava.profile.workload import BEFORE_IMAGE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    calls: int
    """Calls that were timed."""
    mean: float
    ready: float | None = None
    """Seconds that preparing and warming up took, compiling included; None where it was not looked at."""

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, the mean over `calls` in a row that the device may run without a pause."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - begun) / calls


def time_in_turn(
    timed: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, *, calls: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Time every call of `timed` in `rounds` rounds, by turns, so that all of them see the same load of the machine.

    A round makes each call `calls` times between two synchronisations: 1 on a CPU, more on a device that works ahead of
    the host. Raises ValueError unless rounds and calls are at least 1.
    """
    if rounds < 1 or calls < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, calls={calls}, warmup={warmup}: give 1 or more rounds and calls")
    for call in timed.values():
        for _ in range(warmup):
            call()
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            taken[name].append(seconds_of(call, device, calls))
    return {name: summary(times, calls) for name, times in taken.items()}


def summary(seconds: list[float], calls: int = 1) -> Timing:
    """Return median and quartiles of the given seconds, each the mean of `calls` calls."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], calls, seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds) * calls, statistics.fmean(seconds))


def attempt(what: Any, measure: Callable[[], Timing]) -> Timing | Exception:
    """Return what `measure` returns, or the exception it raises, which is logged: other measurements go on."""
    try:
        return measure()
    except Exception as error:
        log.exception("%s cannot be timed", what)
        error.__context__ = None
        return error.with_traceback(None)  # its frames hold what was in the memory


def describe(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, from its making to its end; `known` ones excepted."""

    def __init__(self, known: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__()
        self.sizes = {storage._cdata: 0 for storage in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@dataclass(frozen=True)
class Peak:
    """The most memory that was in use while something ran."""

    bytes: int
    how: str
    """Name of the count: the device's allocator, or live tensors."""


def peak_memory(
    prepare: Callable[[], Any], work: Callable[[Any], Any], device: torch.device, held: Iterable[Tensor] = ()
) -> Peak:
    """Run `work` on what `prepare` returns; the highest number of bytes in use during `work`.

    What `prepare` made and left behind counts, and so do the `held` tensors (weights, inputs); what it used on the way
    does not. On an accelerator: the most that its allocator had handed out, everything else on the device included; the
    count is reset before and read after, synchronised. On a CPU: bytes of tensor storages; what a kernel uses inside
    itself is not seen there.
    """
    if device.type != "cpu":
        prepared = prepare()
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        work(prepared)
        torch.accelerator.synchronize(device)
        return Peak(torch.accelerator.max_memory_allocated(device), "allocated on the device")
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in held)}
    with LiveMemory(storages.values()) as memory:
        prepared = prepare()
        memory.peak = memory.live
        work(prepared)
    return Peak(sum(storage.nbytes() for storage in storages.values()) + memory.peak, "bytes of live tensors")


@dataclass(frozen=True)
class Work:
    """The least work of a phase."""

    flops: int
    bytes: int
    """Bytes to read: weights once for the whole batch, keys and values of every row."""


def work_of(phase: str, preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a phase: vision, prefill, step, step without cache. ValueError for another one."""
    if phase == "vision":
        return vision_work(preset, value_bytes)
    if phase in ("prefill", "step without cache"):
        return prefill_work(preset, way, value_bytes, outputs)
    if phase == "step":
        return step_work(preset, way, value_bytes, outputs)
    raise ValueError(f"phase={phase!r} is not known; choose vision, prefill, step or step without cache")


def vision_work(preset: Preset, value_bytes: int) -> Work:
    """Return the work of vision tower and projector on one image per row, without what a method is shown of them."""
    shape = preset.shape
    flops = preset.batch * (shape.vision.flops + shape.projector.forward)
    return Work(flops, value_bytes * (shape.vision.parameters + shape.projector.parameters))


def prefill_work(preset: Preset, way: Way, value_bytes: int, outputs: int = 0) -> Work:
    """Return the work of a prefill, or of a step without cache after `outputs` tokens; predictors included."""
    decoder = preset.shape.decoder
    flops = prefill_flops(shape=decoder, **preset.groups(way, outputs), batch=preset.batch)
    if way != "dense" and preset.method is not None:
        flops += preset.batch * preset.method.evidence_flops(
            preset.seen(way, outputs), decoder, causal=True, question=preset.text - BEFORE_IMAGE
        )
    if way != "dense" and preset.method is None:
        decided = outputs if way == "both" else 0
        image_tokens = preset.shape.tokens_per_image
        flops += preset.batch * predictor_flops(decoder.hidden, image_tokens, output_tokens=decided)
    return Work(flops, weight_bytes(decoder, value_bytes))


def step_work(preset: Preset, way: Way, value_bytes: int, outputs: int) -> Work:
    """Return the work of a cached step after `outputs` tokens, the output predictor of _I|T included."""
    decoder, held = preset.shape.decoder, preset.held(way, outputs)
    flops = flops_decode_step(held, decoder, batch=preset.batch) + head_flops(preset.batch, decoder)
    moved = decode_step_bytes(decoder, held, bytes_per_value=value_bytes, batch=preset.batch)
    if way != "dense" and preset.method is not None:
        flops += preset.batch * preset.method.evidence_flops(held, decoder, step=True)
    if way == "both" and preset.method is None:
        extra = output_predictor_work(preset, value_bytes)
        return Work(flops + extra.flops, moved + extra.bytes)
    return Work(flops, moved)


def output_predictor_work(preset: Preset, value_bytes: int) -> Work:
    """Return what the output predictor adds to a step."""
    judges = [
        part for part in learned_costs(SparsityConfig(), preset.shape.decoder.hidden).values() if part.judges_outputs
    ]
    flops = preset.batch * sum(part.judging(1) for part in judges)
    return Work(flops, value_bytes * sum(part.parameters for part in judges))


@dataclass(frozen=True)
class DeviceLimits:
    """The rates that the device reached in this run."""

    bytes_per_second: float
    """Bytes read and written by a copy of a large tensor."""
    flops_per_second: float
    """FLOP/s of a large square matrix product in the model's dtype."""

    def seconds(self, work_bytes: float, flops: float) -> float:
        """Return the least time for moving so many bytes and doing so many operations, each hidden behind the other."""
        return max(work_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> DeviceLimits:
    """Measure copy bandwidth and matmul rate with tensors too large for any cache; the best round counts."""
    on_cpu = device.type == "cpu"
    source = torch.randn(2**26 if on_cpu else 2**30, device=device, dtype=dtype)
    target = torch.empty_like(source)
    side = 2048 if on_cpu else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    timed = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(left, right, out=product)}
    times = time_in_turn(timed, device, rounds, calls=1 if on_cpu else 10)
    moved = 2 * source.numel() * source.element_size()
    return DeviceLimits(moved / times["copy"].low, 2 * side**3 / times["matmul"].low)


def with_limit(row: Mapping[str, Any], limits: DeviceLimits) -> dict[str, Any]:
    """Return a row of times with the least time for its work and the share that was reached, where it has both."""
    if not (row.get("flops") and row.get("bytes") and row.get("seconds")):
        return dict(row)
    least = limits.seconds(row["bytes"], row["flops"])
    bound = "bytes" if row["bytes"] / limits.bytes_per_second >= least else "FLOPs"
    return {**row, "limit": least, "bound": bound, "share": least / row["seconds"]}


LIMIT_COLUMNS = (
    Column("bytes", "GB", ".3f", 1e-9),
    Column("flops", "GFLOP", ".1f", 1e-9),
    Column("limit", "limit, ms", ".3f", 1e3),
    Column("bound", "bound by"),
    Column("share", "limit / measured", ".0%"),
)
"""Columns that stand beside the times in a table with limits."""


def limit_notes(limits: DeviceLimits) -> list[str]:
    """Return what has to be said about the limits."""
    return [
        f"Limits measured in this run: copy {limits.bytes_per_second / 1e9:.1f} GB/s, matrix product "
        f"{limits.flops_per_second / 1e12:.3f} TFLOP/s.",
        "Bytes: weights once, keys and values of every row. FLOPs: linear maps, causal attention, head, predictors.",
    ]
