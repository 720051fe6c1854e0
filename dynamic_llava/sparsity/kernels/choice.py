"""Which implementation of an operation runs: the choice is an argument, made from shapes and device, and logged."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_SIZE = 128
"""Largest head size of the Triton kernels' block tables."""
TRITON_CAPABILITY = (8, 0)
"""Least NVIDIA compute capability: the first with bfloat16 products and asynchronous copies."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(operation: str, asked: str, fallback: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Resolve `auto` to "triton", where it can run on a GPU, or to `fallback`; the reason is logged once.

    asked: what the caller wrote; anything but `auto` is returned as it is. ValueError where "triton" was asked for by
    name and cannot run: nothing is replaced silently.
    """
    if asked not in ("auto", "triton"):
        return asked
    # On a CPU `auto` never means triton, not even where its interpreter could run it.
    by_default_not = "the tensors are on the CPU" if asked == "auto" and device.type == "cpu" else None
    obstacle = by_default_not or triton_obstacle(device, dtype, head_size)
    if asked == "triton":
        if obstacle:
            raise ValueError(f"{operation}: triton cannot run here: {obstacle}; use 'auto' or {fallback!r}")
        return "triton"
    chosen = fallback if obstacle else "triton"
    log_once(f"{operation} runs as {chosen}: {obstacle or f'{device.type} device, {dtype}, head size {head_size}'}")
    return chosen


def triton_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why the Triton kernels cannot run on tensors of this kind, None where they can."""
    if not installed():
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"it computes in {', '.join(str(known) for known in TRITON_DTYPES)}, not in {dtype}"
    if head_size > TRITON_HEAD_SIZE:
        return f"its block tables end at head size {TRITON_HEAD_SIZE}, and this one is {head_size}"
    if device.type == "cpu":
        return None if interpreted() else "the tensors are on the CPU and TRITON_INTERPRET=1 was not set at start"
    capability = nvidia_capability(device)
    if capability is None:
        return f"it is written for NVIDIA GPUs, and the tensors are on {device}"
    if capability < TRITON_CAPABILITY:
        return f"it needs compute capability {TRITON_CAPABILITY}, and {device} has {capability}"
    return None


@cache
def installed() -> bool:
    """Whether Triton can be imported; looked up once, because layers ask at every call."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 was set before they were first imported."""
    from dynamic_llava.sparsity.kernels import triton_common

    return triton_common.INTERPRETED


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None for any other device."""
    if torch.version.hip is not None or device.type == "cpu":
        return None
    ask = getattr(getattr(torch, device.type, None), "get_device_capability", None)
    capability = ask(device) if ask else None
    # Other vendors' modules answer with a dictionary, or not at all.
    return capability if isinstance(capability, tuple) else None


@cache
def log_once(message: str) -> None:
    """Log a message the first time it is given."""
    logger.info(message)
