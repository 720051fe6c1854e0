"""Model FLOPs utilisation (MFU): which share of the devices' peak a run's training FLOPs reach."""

import logging
import re
from collections.abc import Mapping

import torch
from accelerate import PartialState
from torch import Tensor

from dynamic_llava.config import TrainConfig
from dynamic_llava.costs import TrainingFlops

log = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
}
"""Dense bfloat16 peak by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""


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
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
