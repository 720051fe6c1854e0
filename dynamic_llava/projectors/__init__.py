"""Projectors: one file each, from the vision tower's features to image tokens."""

from dynamic_llava.projectors.base import (
    BlockProjector,
    Grid,
    Layers,
    Projector,
    as_blocks,
    as_map,
    feature_width,
    grid_of,
)
from dynamic_llava.projectors.c_abstractor import CAbstractor
from dynamic_llava.projectors.ldp_v2 import LdpV2
from dynamic_llava.projectors.mlp import Mlp
from dynamic_llava.projectors.pixel_shuffle import PixelShuffle
from dynamic_llava.projectors.registry import (
    DEFAULT,
    PROJECTORS,
    STRATEGIES,
    find_projector,
    image_tokens,
    import_projector,
    layers_of,
    name_of,
    tokens_of,
)
from dynamic_llava.projectors.resampler import Resampler
from dynamic_llava.projectors.tiles import Size, Tiling
from dynamic_llava.projectors.tokenpacker import TokenPacker, TokenPacker3, TokenPacker4

__all__ = [
    "DEFAULT",
    "PROJECTORS",
    "STRATEGIES",
    "BlockProjector",
    "CAbstractor",
    "Grid",
    "Layers",
    "LdpV2",
    "Mlp",
    "PixelShuffle",
    "Projector",
    "Resampler",
    "Size",
    "Tiling",
    "TokenPacker",
    "TokenPacker3",
    "TokenPacker4",
    "as_blocks",
    "as_map",
    "feature_width",
    "find_projector",
    "grid_of",
    "image_tokens",
    "import_projector",
    "layers_of",
    "name_of",
    "tokens_of",
]
