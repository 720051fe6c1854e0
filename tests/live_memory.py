"""What a training step holds in memory, measured on the CPU: a stand-in for an accelerator's allocator statistics."""

import contextlib

import torch

from dynamic_llava.profile.measuring import LiveMemory


def measure_step(model, inputs, *, autocast, **switches):
    """Run forward and backward; return (bytes alive between them, bytes at the peak), state and inputs not counted."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveMemory([tensor.untyped_storage() for tensor in known]) as memory:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = model(**inputs, **switches, skip_logits=True).loss
        between = memory.live
        loss.backward()
    return between, memory.peak
