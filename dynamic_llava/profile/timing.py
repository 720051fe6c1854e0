"""How long something takes: warm-up, medians, spread, and a device that has finished before the clock is read."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
