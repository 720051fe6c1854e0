"""Which implementations of the sparsity kernels can run in this process, and where.

Triton's kernels run on a GPU, or on the CPU where TRITON_INTERPRET=1 was set before Triton was first imported:
test_triton.py runs the tests of both operations once more in such a process.
"""

import os

import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_TRITON = HAS_GPU or INTERPRETED


def with_triton(*others):
    """The names of all implementations that can run here."""
    return (*others, "triton") if RUNS_TRITON else others


def device_of(implementation):
    return torch.device("cuda" if implementation == "triton" and HAS_GPU and not INTERPRETED else "cpu")


def moved(arguments, implementation):
    """Arguments by name, tensors moved to the device of the implementation."""
    device = device_of(implementation)
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
