"""Peak memory of a piece of work: an accelerator's own count, and on a CPU the bytes of all tensors that are alive."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
