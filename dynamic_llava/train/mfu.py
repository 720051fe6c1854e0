"""Model FLOPs utilisation (MFU): which share of the devices' peak a run's training FLOPs reach."""

import logging
from collections.abc import Mapping

import torch
from accelerate import PartialState
from torch import Tensor

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import TrainingFlops, device_peak

log = logging.getLogger(__name__)


def batch_flops(flops: TrainingFlops, inputs: Mapping[str, Tensor], lengths_B: Tensor) -> Tensor:
    """Return the FLOPs of forward and backward pass of a batch, () float64, without reading anything on the host.

    lengths_B (B,) integer: real tokens of each row; padding is work that does not count.
    """
    lengths = lengths_B.double()
    pictures = inputs.get("pixel_values")
    images = 0 if pictures is None else len(pictures)
    text = flops.per_token * lengths + flops.per_pair * lengths * (lengths + 1) / 2
    return text.sum() + flops.per_image * images + flops.per_output_token * inputs["output_mask"].sum()


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
