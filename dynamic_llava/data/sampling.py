"""The order of an epoch: every sample exactly once, on any number of processes, batch size and accumulation."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

FILLER = -1
"""Index, and sample id, of the samples that fill the last optimizer step of an epoch; they teach nothing."""
WINDOW_STEPS = 50
"""Optimizer steps among whose samples lengths are grouped (the window of transformers' group_by_length)."""


class EpochSampler(Sampler[int]):
    """Yields every index below `samples` once per epoch in a random order, then FILLER up to whole optimizer steps.

    Processes that take turns with their batches, as accelerate's do, would otherwise repeat samples of the first
    batches or lose the last ones. The order is a function of (seed, epoch): that of accelerate's seeded sampler.

    Args:
        samples: number of samples.
        step_size: samples of an optimizer step, over its batches and all processes.
        seed: of the order.
        epoch: returns the epoch that begins; a function, because a resumed run begins in the middle of one.
        lengths: (samples,) tokens; given, batches hold samples of similar length. The order is then sorted within
            windows of WINDOW_STEPS steps, and the steps of a window are shuffled; the samples that make no whole step
            come last.
    """

    def __init__(
        self,
        samples: int,
        step_size: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: np.ndarray | None = None,
    ) -> None:
        if samples < 1 or step_size < 1:
            raise ValueError(f"{samples} samples in steps of {step_size} make no epoch; give 1 or more of both")
        if lengths is not None and len(lengths) != samples:
            raise ValueError(f"{len(lengths)} lengths were given for {samples} samples; give one each")
        self.samples, self.step_size, self.seed, self.epoch, self.lengths = samples, step_size, seed, epoch, lengths

    def __len__(self) -> int:
        return -(-self.samples // self.step_size) * self.step_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(self.samples, generator=generator).numpy()
        if self.lengths is not None:
            order = self._grouped(order, generator)
        for number in order:
            yield int(number)
        for _ in range(len(self) - self.samples):
            yield FILLER

    def _grouped(self, order: np.ndarray, generator: torch.Generator) -> np.ndarray:
        whole = self.samples // self.step_size * self.step_size
        parts = []
        for start in range(0, whole, WINDOW_STEPS * self.step_size):
            window = order[start : min(start + WINDOW_STEPS * self.step_size, whole)]
            steps = window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, self.step_size)
            parts.append(steps[torch.randperm(len(steps), generator=generator).numpy()].ravel())
        return np.concatenate([*parts, order[whole:]])


def padding_share(lengths: np.ndarray, order: np.ndarray, batch_size: int) -> float:
    """Return the share of padding in batches of `batch_size` that follow `order`, FILLER left out."""
    order = order[order != FILLER]
    edges = np.arange(0, len(order), batch_size)
    longest = np.maximum.reduceat(lengths[order], edges)
    sizes = np.diff([*edges, len(order)])
    return float(1 - lengths[order].sum() / (longest * sizes).sum())
