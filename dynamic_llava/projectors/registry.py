"""The projectors that have a name, and what others ask of them: the number of an image's tokens, and costs.

Costs are counted on the module itself, with tensors on `meta`, so that a new projector needs no formula.
"""

import sys
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava.files import brief
from dynamic_llava.projectors.base import Grid, Layers, Projector, feature_width
from dynamic_llava.projectors.c_abstractor import CAbstractor
from dynamic_llava.projectors.ldp_v2 import LdpV2
from dynamic_llava.projectors.mlp import Mlp
from dynamic_llava.projectors.pixel_shuffle import PixelShuffle
from dynamic_llava.projectors.resampler import Resampler
from dynamic_llava.projectors.tokenpacker import TokenPacker, TokenPacker3, TokenPacker4

PROJECTORS: dict[str, type[Projector]] = {
    projector.name: projector
    for projector in (Mlp, CAbstractor, LdpV2, PixelShuffle, Resampler, TokenPacker, TokenPacker3, TokenPacker4)
}
"""Registered name -> class. A new one is one file and one row here."""
DEFAULT = Mlp.name
"""The projector of a configuration that names none: LLaVA-1.5's."""
STRATEGIES = {"default": False, "full": True}
"""vision_feature_select_strategy -> whether the class token is handed to the projector beside the patches."""


def find_projector(name: Any) -> type[Projector]:
    """Return the projector of a name: a registered one, or package.module:Class of a module that is imported already.

    A configuration may come with a checkpoint, and a file imports no code. Raises ValueError for any other name.
    """
    if name in PROJECTORS:
        return PROJECTORS[name]
    known = f"choose one of {', '.join(map(repr, PROJECTORS))}, or name a class of your own as package.module:Class"
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"projector={brief(name)} is not known; {known}")
    module, _, class_name = name.partition(":")
    if module not in sys.modules:
        raise ValueError(
            f"projector={brief(name)} is of a module that is not imported, and a configuration imports no code: if you "
            f"trust it, say `import {module}` before, or name it on the command line (--projector {name})"
        )
    found = getattr(sys.modules[module], class_name, None)
    if not (isinstance(found, type) and issubclass(found, Projector)):
        raise ValueError(f"projector={brief(name)}: {module} has no class {class_name!r} that extends Projector")
    return found


def import_projector(name: str | None) -> None:
    """Import the module of package.module:Class, which a user has named; a name or None needs none.

    A configuration that names it can be read from then on. ValueError where it is not there or no projector.
    """
    if name is None:
        return
    if name not in PROJECTORS and ":" in name:
        module = name.partition(":")[0]
        try:
            import_module(module)
        except Exception as error:  # whatever a module of one's own does while it is imported
            raise ValueError(
                f"projector={brief(name)}: importing {module} failed ({type(error).__name__}: {error}); its folder "
                "must be the current one, or stand in PYTHONPATH"
            ) from error
    find_projector(name)


def name_of(projector: type[Projector]) -> str:
    """Return the name by which `find_projector` finds a class."""
    registered = PROJECTORS.get(getattr(projector, "name", ""))
    return projector.name if registered is projector else f"{projector.__module__}:{projector.__qualname__}"


def tokens_of(image_size: int, patch_size: int, strategy: str = "default", projector: Any = DEFAULT) -> int:
    """Return n, the tokens of an image of `image_size` pixels a side, cut into patches of `patch_size`.

    `strategy` is a vision_feature_select_strategy. ValueError for an unknown one, and where the projector says so.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"vision_feature_select_strategy={brief(strategy)} is unknown; choose one of "
            f"{', '.join(map(repr, STRATEGIES))}"
        )
    grid: Grid = (image_size // patch_size,) * 2
    return find_projector(projector).tokens(grid, STRATEGIES[strategy])


def image_tokens(config: Any, strategy: str | None = None) -> int:
    """Return n for a LlavaConfig or DynamicLlavaConfig, under its own strategy or another; with what a method adds."""
    vision = config.vision_config
    strategy = strategy if strategy is not None else config.vision_feature_select_strategy
    made = tokens_of(vision.image_size, vision.patch_size, strategy, getattr(config, "projector", DEFAULT))
    return made + getattr(config, "added_image_tokens", 0)


def layers_of(config: Any) -> Layers:
    """Return the layers of the vision tower that a configuration's projector reads; ValueError where it cannot."""
    projector = find_projector(getattr(config, "projector", DEFAULT))
    return projector.layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)


class ProjectorCosts(NamedTuple):
    """Counts for one image."""

    parameters: int
    """Weights and biases; of the whole projector, not of one image."""
    forward: int
    """FLOPs of the matrix products."""
    backward: int
    """FLOPs of their gradients, of weights and of inputs other than the features."""
    kept: int
    """Values that the forward pass keeps for the backward pass, weights not counted."""


def projector_costs(config: Any) -> ProjectorCosts:
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
    return ProjectorCosts(
        parameters=sum(weight.numel() for weight in projector.parameters()),
        forward=forward.get_total_flops(),
        backward=backward.get_total_flops(),
        kept=sum(tensor.numel() for tensor in kept.values()),
    )
