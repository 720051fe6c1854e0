"""What a projector is: the way from the vision tower's features to image tokens, and the number of those.

A projector is one file with one class, found by its name in `registry.py` or as package.module:Class. The model, the
processor, data preparation and the costs all ask `tokens`; nobody else knows how many tokens an image becomes.
Shape suffixes: I images, P patches of one image (and the class token), F feature size, n image tokens, D hidden
size.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns of patches of one image."""


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


def feature_width(config: Any) -> int:
    """Return F, the width of what a projector reads: the tower's, for each layer of vision_feature_layer."""
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)))
