"""What a projector costs, counted on the module itself, so that a new one needs no formula. Tensors are on `meta`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava.projectors.base import feature_width
from dynamic_llava.projectors.registry import DEFAULT, STRATEGIES, find_projector


class Measured(NamedTuple):
    """Counts for one image."""

    parameters: int
    """Weights and biases; of the whole projector, not of one image."""
    forward: int
    """FLOPs of the matrix products."""
    backward: int
    """FLOPs of their gradients, of weights and of inputs other than the features."""
    kept: int
    """Values that the forward pass keeps for the backward pass, weights not counted."""


def measure(config: Any) -> Measured:
    """Return the costs of the projector of a LlavaConfig or DynamicLlavaConfig."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + STRATEGIES[config.vision_feature_select_strategy]
    with torch.device("meta"):
        projector = find_projector(getattr(config, "projector", DEFAULT))(config, nn.GELU())
        features_1PF = torch.empty(1, patches, feature_width(config))
    weights = {id(weight) for weight in projector.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[id(tensor if tensor._base is None else tensor._base)] = tensor
        return tensor

    with torch.enable_grad():
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens_1nD = projector(features_1PF)
        with FlopCounterMode(display=False) as backward:
            tokens_1nD.sum().backward()
    return Measured(
        parameters=sum(weight.numel() for weight in projector.parameters()),
        forward=forward.get_total_flops(),
        backward=backward.get_total_flops(),
        kept=sum(tensor.numel() for tensor in kept.values()),
    )
