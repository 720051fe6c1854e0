"""How many tiles and tokens an image of any size becomes: transformers' own counts, whatever the size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

from dynamic_llava.projectors import Tiling
from tests.tiled import PINPOINTS, TILING

LLAVA_1_6 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""image_grid_pinpoints of every llava-v1.6 checkpoint."""
FULL = Tiling(336, 14, tuple(map(tuple, LLAVA_1_6)))


def theirs(tiling, size, pinpoints):
    """Return tiles, tokens and grid of an image as transformers counts them, of the three places where it does."""
    counted = LlavaNextProcessor._get_number_of_features
    processor = type("Counts", (), {"_get_unpadded_features": LlavaNextProcessor._get_unpadded_features})()
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)
    processor.patch_size, processor.num_additional_image_tokens = tiling.patch, 0
    height, width = select_best_resolution(size, pinpoints)
    whole = torch.zeros(1, height // tiling.patch, width // tiling.patch)
    grid = tuple(unpad_image(whole, list(size)).shape[1:])
    return (
        image_size_to_num_patches(list(size), pinpoints, tiling.side),
        counted(processor, *size, tiling.side, tiling.side),
        grid,
    )


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), st.booleans())
def test_counts_are_those_of_transformers(size, full):
    tiling, pinpoints = (FULL, LLAVA_1_6) if full else (TILING, PINPOINTS)
    assert (tiling.tiles(size), tiling.tokens(size), tiling.grid(size)) == theirs(tiling, size, pinpoints)
    newlines = tiling.newlines(size)
    assert len(newlines) == tiling.tokens(size) and not any(newlines[: tiling.along**2])
    assert newlines.count(False) == tiling.image_tokens(size) and newlines.count(True) == tiling.grid(size)[0]
    assert tiling.tiles(size) <= tiling.most_tiles


@pytest.mark.parametrize(
    ("size", "tiles", "tokens", "newlines"),
    [
        # By hand: 24 x 24 for the whole picture, and rows of patches of 14 pixels with a newline each.
        ((336, 336), 3, 576 + 24 * 24 + 24, 24),  # into 336 x 672, of which the sides are padding
        ((672, 672), 5, 576 + 48 * 48 + 48, 48),  # fills all four tiles
        ((480, 640), 5, 576 + 36 * 48 + 36, 36),  # 504 of 672 rows of pixels are filled
        ((1000, 250), 4, 576 + 72 * 18 + 72, 72),  # into 1008 x 336, 252 of which are filled
    ],
)
def test_counts_by_hand(size, tiles, tokens, newlines):
    assert (FULL.tiles(size), FULL.tokens(size), FULL.newlines(size).count(True)) == (tiles, tokens, newlines)
