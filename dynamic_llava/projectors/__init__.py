"""Projectors: one file each, from the vision tower's features to image tokens."""

from dynamic_llava.projectors.base import Grid, Projector, feature_width
from dynamic_llava.projectors.mlp import Mlp
from dynamic_llava.projectors.registry import (
    DEFAULT,
    PROJECTORS,
    STRATEGIES,
    find_projector,
    image_tokens,
    name_of,
    tokens_of,
)

__all__ = [
    "DEFAULT",
    "PROJECTORS",
    "STRATEGIES",
    "Grid",
    "Mlp",
    "Projector",
    "feature_width",
    "find_projector",
    "image_tokens",
    "name_of",
    "tokens_of",
]
