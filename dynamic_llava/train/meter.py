"""Collects a training window's numbers on the device and reduces them once, when a line is logged.

Among them is the model FLOPs utilisation (MFU): which share of the devices' peak the training's FLOPs reach.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import TrainingFlops, device_peak

log = logging.getLogger(__name__)


SCHEDULED = ("image_keep_rate", "output_keep_rate")
"""The targets that train.keep_rate_schedule moves: the first is a setting of the method, the second one of the call."""


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


def batch_flops(flops: TrainingFlops, inputs: Mapping[str, Tensor], lengths_B: Tensor) -> Tensor:
    """Return the FLOPs of forward and backward pass of a batch, () float64, without reading anything on the host.

    lengths_B (B,) integer: real tokens of each row; padding is work that does not count.
    """
    lengths = lengths_B.double()
    pictures = inputs.get("pixel_values")
    images = 0 if pictures is None else len(pictures)
    text = flops.per_token * lengths + flops.per_pair * lengths * (lengths + 1) / 2
    outputs = inputs["output_mask"].sum()
    judged = flops.per_output_token * outputs + flops.per_prompt_token * (lengths.sum() - outputs)
    head = flops.per_learned_token * (inputs["labels"][:, 1:] != -100).sum()
    return text.sum() + flops.per_image * images + judged + head


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Return the peak of one device in FLOP/s: train.peak_tflops, or what its name tells; None where nobody knows."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type == "cpu":
        return None
    name = torch.get_device_module(device).get_device_name(device)
    tflops = peak_of(name)
    if tflops is None:
        if PartialState().is_main_process:
            log.warning("the peak of %r is not known, so mfu is not logged; set train.peak_tflops to log it", name)
        return None
    return tflops * 1e12


def peak_of(name: str) -> float | None:
    """Return the dense bfloat16 peak in TFLOP/s of a device of this name, or None."""
    peak = device_peak(name)
    return None if peak is None else peak.tflops
