"""Images of any size in a call to the model (LLaVA-NeXT): their sizes, their tiles, and the tokens that they become.

Shape suffixes: I images of the batch in row order, n image tokens of one image with its newlines, S pixels a side of a
tile, D hidden size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from dynamic_llava.files import brief
from dynamic_llava.projectors import DEFAULT, Tiling

Sizes = list[list[int]]
"""Height and width in pixels of each image, in row order."""
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""image_grid_pinpoints of a llava_next config.json that says none, as in transformers."""
_GIVE = "give image_sizes, (images, 2) heights and widths in pixels, as the processor makes them beside pixel_values"


class TiledImages:
    """What DynamicLlavaModel does with images of any size, where its configuration has image_grid_pinpoints."""

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles; None where all have one size."""
        return Tiling.of(self.config)  # type: ignore[attr-defined]

    def _tiling(self) -> Tiling:
        tiling = self.tiling
        assert tiling is not None
        return tiling

    def tiled_lengths(self, sizes: Any, features: Any, has_places: bool) -> list[int]:
        """Return the tokens of each image of a call, newlines counted; none where the call has no images.

        Features in a list say their lengths themselves, and must have those of their sizes, if these are given.
        """
        if not has_places:
            return []
        if sizes is None and features is not None:
            return [len(one) for one in features]
        lengths = [self._tiling().tokens(size) for size in sizes_of(sizes)]
        if features is not None and [len(one) for one in features] != lengths:
            raise ValueError(
                f"image_features hold images of {', '.join(str(len(one)) for one in features)} tokens, and images of "
                f"these image_sizes have {', '.join(map(str, lengths))}; give the sizes that the features were made of"
            )
        return lengths

    def newlines_of(self, sizes: Any) -> Tensor:
        """(T,) bool: which of the tokens of all images are newlines; ValueError where their sizes are not given."""
        tiling = self._tiling()
        return torch.tensor([mark for size in sizes_of(sizes) for mark in tiling.newlines(size)], dtype=torch.bool)

    def tiles_of(self, pixel_values: Tensor, sizes: Any) -> Tensor:
        """Return the tiles of all images, one after the other, (tiles, 3, S, S).

        They are given so, or with those of each image filled up to the most of the batch, (I, most, 3, S, S). Raises
        ValueError for another shape, and where images of these sizes have more or fewer tiles.
        """
        tiling, vision = self._tiling(), self.config.vision_config  # type: ignore[attr-defined]
        counts, shape = [tiling.tiles(size) for size in sizes_of(sizes)], tuple(pixel_values.shape)
        wanted = (vision.num_channels, tiling.side, tiling.side)
        if shape[-3:] != wanted or len(shape) not in (4, 5):
            raise ValueError(
                f"pixel_values has shape {shape} but the vision tower takes tiles of {wanted}; give (images, tiles, "
                f"{', '.join(map(str, wanted))}), as the processor makes them, or the tiles of all images one after "
                f"the other, (tiles, {', '.join(map(str, wanted))})"
            )
        if len(shape) == 5 and (shape[0] != len(counts) or shape[1] < max(counts, default=0)):
            raise ValueError(
                f"pixel_values has shape {shape}, and image_sizes are those of {len(counts)} images of "
                f"{', '.join(map(str, counts))} tiles; give the sizes of these images"
            )
        if len(shape) == 5:
            return torch.cat([one[:count] for one, count in zip(pixel_values, counts, strict=True)])
        if shape[0] != sum(counts):
            raise ValueError(
                f"pixel_values holds {shape[0]} tiles, and images of these image_sizes have "
                f"{' + '.join(map(str, counts))}; give the sizes of these images"
            )
        return pixel_values

    def filled(self, pixel_values: Any, sizes: Any) -> Any:
        """Return pixels with one entry for each image: tiles that follow one another as (I, most, 3, S, S)."""
        if self.tiling is None or pixel_values is None or pixel_values.dim() != 4:
            return pixel_values
        counts = [self._tiling().tiles(size) for size in sizes_of(sizes)]
        return nn.utils.rnn.pad_sequence(self.tiles_of(pixel_values, sizes).split(counts), batch_first=True)

    def packed(self, features: Sequence[Tensor], sizes: Any) -> list[Tensor]:
        """Return (n, D) of each image, of the projected features of all tiles, by transformers' own rule."""
        sizes = sizes_of(sizes)
        counts = [self._tiling().tiles(size) for size in sizes]
        if not counts:
            return []
        images, _ = LlavaNextModel.pack_image_features(
            self,
            torch.stack(list(features)).split(counts),
            sizes,
            vision_feature_select_strategy="default",
            image_newline=self.image_newline,  # type: ignore[attr-defined]
        )
        return list(images)

    def blank_tiles(self, like: Tensor) -> tuple[Tensor, Sizes]:
        """Return the tiles and the size of an empty image of one tile's side."""
        tiling = self._tiling()
        size = [tiling.side] * 2
        return like.new_zeros(tiling.tiles(size), 3, *size), [size]


def sizes_of(sizes: Any) -> Sizes:
    """Return image_sizes, a tensor (I, 2) or pairs, as lists of whole numbers; ValueError where they are none."""
    if sizes is None:
        raise ValueError(f"an image of a LLaVA-NeXT becomes as many tokens as its size makes; {_GIVE}")
    rows: Any = sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, size)) for size in sizes]
    if any(not isinstance(row, list) or len(row) != 2 or min(row) < 1 for row in rows):
        given = tuple(sizes.shape) if isinstance(sizes, Tensor) else rows
        raise ValueError(f"image_sizes are {given}, which are no sizes; {_GIVE}")
    return rows  # type: ignore[no-any-return]


def pinpoints_of(values: Mapping[str, Any]) -> Any:
    """Return image_grid_pinpoints of a config.json; None for a LLaVA-1.5, whatever its file says."""
    kind, found = values.get("model_type", "llava"), values.get("image_grid_pinpoints")
    if kind == "llava":
        return None
    return _PINPOINTS if kind == "llava_next" and found is None else found


def check_tiles(source: str | Path, values: Mapping[str, Any], tower: Mapping[str, Any]) -> None:
    """Raise ValueError where images of any size (LLaVA-NeXT) are cut in a way that is not carried."""
    pinpoints, side, patch = pinpoints_of(values), tower.get("image_size", 336), tower.get("patch_size", 14)
    if pinpoints is None:
        return
    pairs = isinstance(pinpoints, list | tuple) and all(isinstance(one, list | tuple) for one in pinpoints)
    lengths = [length for one in pinpoints for length in one] if pairs else []
    whole = all(type(length) is int and length > 0 and length % side == 0 for length in lengths)
    if not lengths or not whole or any(len(one) != 2 for one in pinpoints):
        raise ValueError(
            f"config.json of {source} has image_grid_pinpoints {brief(pinpoints)}; give a list of [height, width], "
            f"each a multiple of the vision tower's image_size, {side}"
        )
    if side % patch:
        raise ValueError(
            f"{source} has tiles of {side} pixels and patches of {patch}, which do not divide them; no LLaVA-NeXT does"
        )
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise ValueError(
            f"config.json of {source} has vision_feature_select_strategy {brief(strategy)}; the tokens of a LLaVA-NeXT "
            "are its patches: set it to 'default'"
        )
    projector = values.get("projector") or DEFAULT
    if projector != DEFAULT:
        raise ValueError(
            f"config.json of {source} has projector {brief(projector)}, and the tiles of a LLaVA-NeXT are put together "
            f"patch by patch; only its own, {DEFAULT!r}, is carried there"
        )
