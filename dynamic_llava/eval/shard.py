"""One process's share of the questions, and what processes tell one another; alone when there is only one.

torchrun's environment variables say which process this is. Only small Python objects travel, by gloo: answers meet in
files.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

PATIENCE = timedelta(days=7)
"""Longest wait of a process for the others, whose shares may take longer; torchrun ends all when one dies."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that merges, scores and prints."""
        return self.rank == 0

    def take(self, items: Sequence[Item]) -> list[Item]:
        """Return every `world`-th item from `rank` on; all processes together have each item once."""
        return list(items[self.rank :: self.world])

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in every process, once all have given theirs."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Shard]:
    """Give this process's share; the processes are connected meanwhile where torchrun started several."""
    world = int(environment.get("WORLD_SIZE", 1))
    if world == 1:
        yield Shard()
        return
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Shard(int(environment["RANK"]), world)
    finally:
        torch.distributed.destroy_process_group()


def own_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """Return the accelerator that belongs to this process on its machine; the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    local, count = int(environment.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if local >= count:
        raise ValueError(f"process {local} of this machine has no accelerator of its own: {count} are visible")
    return torch.device(torch.accelerator.current_accelerator().type, local)
