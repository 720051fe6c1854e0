"""How long a piece of work takes, and the most memory that it holds at once.

Time: warm-up, medians, spread, and a device that has finished before the clock is read. Memory: an accelerator's own
count, and on a CPU the bytes of all tensors that are alive.
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
    ways: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, *, calls: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Time every way `rounds` times by turns, so that all of them see the same load of the machine.

    A round calls a way `calls` times between two synchronisations: 1 on a CPU, more on a device that works ahead of the
    host. Raises ValueError unless rounds and calls are at least 1.
    """
    if rounds < 1 or calls < 1 or warmup < 0:
        raise ValueError(f"rounds={rounds}, calls={calls}, warmup={warmup}: give 1 or more rounds and calls")
    for way in ways.values():
        for _ in range(warmup):
            way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(seconds_of(way, device, calls))
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
    """What was counted."""


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
