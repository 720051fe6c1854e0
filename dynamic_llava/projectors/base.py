"""What a projector is: the way from the vision tower's features to image tokens, and the number of those.

A projector is one file with one class, found by its name in `registry.py` or as package.module:Class. The model, the
processor, data preparation and the costs all ask `tokens`; nobody else knows how many tokens an image becomes. A
method that learns may put some of its own behind them (`Method.added_tokens`).
Shape suffixes: I images, P patches of one image (and the class token), F feature size, n image tokens, D hidden
size.
"""

from abc import ABC, abstractmethod
from math import isqrt
from typing import Any, ClassVar

from torch import Tensor, nn

from dynamic_llava.files import brief

Grid = tuple[int, int]
"""Rows and columns of patches of one image."""
Layers = int | list[int]
"""Layers of the vision tower by their hidden states, 0 the embeddings, as vision_feature_layer of a configuration."""


class Projector(nn.Module, ABC):
    """Base of all projectors; a module, so what it learns is saved as `multi_modal_projector.*`."""

    name: ClassVar[str]
    per_patch: ClassVar[bool] = False
    """Whether each image token is made of one patch alone, in their order, so that a method's decisions about patches
    are decisions about tokens. Without it methods that read the vision tower are refused."""

    def __init__(self, config: Any, activation: nn.Module) -> None:
        """Build the weights for a LlavaConfig; `activation` is what its projector_hidden_act names."""
        super().__init__()

    @classmethod
    def layers(cls, chosen: Layers, depth: int) -> Layers:
        """Return the layers that are read where a configuration says `chosen`, of a tower of `depth` layers.

        By default those. ValueError for layers that the projector cannot read.
        """
        return chosen

    @classmethod
    @abstractmethod
    def tokens(cls, grid: Grid, class_token: bool = False) -> int:
        """Return n, the tokens of an image of so many patches; `class_token`: whether the tower's comes along.

        ValueError for a grid that the projector cannot serve.
        """

    @abstractmethod
    def forward(self, features_IPF: Tensor) -> Tensor:
        """Return (I, n, D) of an image's features, row by row, behind the class token's where that comes along.

        F is the tower's width times the number of its layers that the configuration's vision_feature_layer names.
        """

    def initialise(self) -> None:
        """Set initial values that are not those of all models: normal weights, zero biases. Bare parameters need it.

        It is called when the model is built, with torch.nn.init's functions guarded, so that nothing loaded is changed.
        """


class BlockProjector(Projector):
    """Base of projectors that make one token for each block of `scale` x `scale` patches, in raster order.

    They have functions and biases of their own, and no place for the class token.
    """

    scale: ClassVar[int] = 2
    """s: patches a side that one token stands for. A class that extends another one may set it anew."""

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__(config, activation)
        for setting, usual in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
            if (given := getattr(config, setting, usual)) != usual:
                raise ValueError(
                    f"{setting}={brief(given)} is a setting of LLaVA's own projector, 'mlp', and {self.name!r} has "
                    "none; leave it out"
                )

    @classmethod
    def tokens(cls, grid: Grid, class_token: bool = False) -> int:
        """Return the number of blocks."""
        if class_token:
            raise ValueError(
                f"projector {cls.name!r} makes tokens of blocks of patches, and none of the class token; set "
                "vision_feature_select_strategy to 'default'"
            )
        if any(side % cls.scale for side in grid):
            raise ValueError(
                f"projector {cls.name!r} makes one token of each {cls.scale} x {cls.scale} patches, and an image of "
                f"{grid[0]} x {grid[1]} patches does not divide into such blocks; choose an image_size that is a "
                f"multiple of {cls.scale} times the patch_size, or another projector"
            )
        return grid[0] * grid[1] // cls.scale**2


def grid_of(config: Any) -> Grid:
    """Return the grid of patches of a LlavaConfig's images."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size,) * 2


def as_map(features_IPF: Tensor) -> Tensor:
    """Return (I, F, rows, columns) of the patches of square images, (I, P, F)."""
    side = isqrt(features_IPF.shape[1])
    return features_IPF.transpose(1, 2).unflatten(2, (side, side))


def as_blocks(features_IPF: Tensor, scale: int) -> Tensor:
    """Return (I, n, scale x scale, F): the patches of each block, both in raster order."""
    side = isqrt(features_IPF.shape[1]) // scale
    blocks = features_IPF.unflatten(1, (side, scale, side, scale))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def heads_of(width: int, of_each: int) -> int:
    """Return the number of heads of at least so many numbers each that a width divides into, 1 for a narrow one."""
    return next(heads for heads in range(max(1, width // of_each), 0, -1) if width % heads == 0)


def feature_width(config: Any) -> int:
    """Return F, the width of what a projector reads: the tower's, for each layer of vision_feature_layer."""
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)))
