"""What a training step holds in memory, measured on the CPU: a stand-in for an accelerator's allocator statistics."""

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, from its making to its end; `known` tensors excepted."""

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.live -= self.sizes.pop(key)


def measure_step(model, inputs, *, autocast, **switches):
    """Run forward and backward; return (bytes alive between them, bytes at the peak), state and inputs not counted."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveMemory(known) as memory:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(**inputs, **switches).loss
        between = memory.live
        loss.backward()
    return between, memory.peak
