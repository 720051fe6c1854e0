"""Collects a training window's numbers on the device and reduces them once, when a line is logged."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Meter:
    """Sums over the micro-batches since the last line; nothing is read on the host before `collect`.

    `shares` are parts of a global mean (a local sum over a global denominator): they add up over micro-batches and
    ranks to one value per step. `ratios` are (numerator, denominator) pairs, `peaks` maxima.
    """

    shares: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    flops: Tensor | None = None
    started: float = field(default_factory=time.perf_counter)
    step: int = 0
    """Step at which the window began."""

    def add_share(self, name: str, value: Tensor) -> None:
        """Add a part of a global mean, a () tensor."""
        value = value.detach().double()
        self.shares[name] = self.shares[name] + value if name in self.shares else value

    def add_ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """Add to a ratio of two () tensors, e.g. kept tokens and tokens."""
        pair = (numerator.detach().double(), denominator.detach().double())
        before = self.ratios.get(name)
        self.ratios[name] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])

    def add_peak(self, name: str, value: Tensor) -> None:
        """Note a () tensor of which the largest counts."""
        value = value.detach().double()
        self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value

    def add_tokens(self, count: Tensor) -> None:
        """Count tokens that were processed, a () integer tensor."""
        self.tokens = count if self.tokens is None else self.tokens + count

    def add_flops(self, count: Tensor) -> None:
        """Count floating-point operations that training took, a () tensor."""
        self.flops = count if self.flops is None else self.flops + count

    def collect(self, accelerator: Any, step: int, peak: float | None = None) -> dict[str, float]:
        """Reduce over the ranks and return the values of the window that ends at `step`.

        Every rank has added the same names, whatever its batches held. A ratio without a denominator is left out, and
        so is the MFU without the `peak` FLOP/s of a device.
        """
        names = [*sorted(self.shares), *sorted(self.ratios)]
        sums = [self.shares[name] for name in sorted(self.shares)]
        for name in sorted(self.ratios):
            sums += self.ratios[name]
        nothing = torch.zeros((), device=accelerator.device)
        sums += [nothing if counted is None else counted for counted in (self.tokens, self.flops)]
        totals = accelerator.reduce(torch.stack([s.double() for s in sums]), reduction="sum").tolist()
        steps = max(step - self.step, 1)
        values = {name: totals[place] / steps for place, name in enumerate(names[: len(self.shares)])}
        for place, name in enumerate(sorted(self.ratios)):
            numerator, denominator = totals[len(self.shares) + 2 * place :][:2]
            if denominator:
                values[name] = numerator / denominator
        for name in sorted(self.peaks):
            values[name] = accelerator.gather(self.peaks[name][None]).max().item()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        values["tokens_per_second"] = totals[-2] / seconds
        if peak is not None:
            values["mfu"] = totals[-1] / (seconds * accelerator.num_processes * peak)
        return values
