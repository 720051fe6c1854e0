"""Where an image's patches lie on the image itself, as it was before it was padded, at any size it is drawn in.

The model sees an image padded to a square (processing/images.py), cut into rows and columns of patches. A pixel of a
drawing belongs to the patch that its centre lies in, in whole numbers, so that no edge is off by a rounding. A patch
that lies in the padding alone has no pixel.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image

HEAT = "viridis"
"""matplotlib's colours of heat maps: lighter is more, for colour-blind eyes and in grey too."""
LONGEST_SIDE = 720
"""Pixels of the longest side of a drawn image."""
_FADE, _FADED_PAPER = 0.9, 226
"""Dropped patches: so much of a light grey, darker than white paper, so that kept white is not taken for dropped."""
_HEAT_SHARE = 0.72


@dataclass(frozen=True)
class PatchView:
    """The patches of one image."""

    size: tuple[int, int]
    """Width and height of the image in pixels."""
    grid: tuple[int, int]
    """Rows and columns of patches. Where they differ, the image is padded to a rectangle of their proportion."""

    @property
    def count(self) -> int:
        """Patches."""
        return self.grid[0] * self.grid[1]

    def numbers(self, width: int, height: int) -> np.ndarray:
        """Return (height, width) int64: the patch, row by row, of each pixel of the image drawn at that size."""
        rows, columns = self.grid
        row, column = self._places(height, 1), self._places(width, 0)
        assert row.min() >= 0 and row.max() < rows and column.min() >= 0 and column.max() < columns
        return row[:, None] * columns + column

    def boxes(self, width: int, height: int) -> dict[int, tuple[float, float, float, float]]:
        """Return patch -> (left, top, right, bottom) in pixels of such a drawing, cut at its edges.

        Patches that show nothing of the image are left out.
        """
        along = [self._spans(1, height), self._spans(0, width)]
        return {
            row * self.grid[1] + column: (left, top, right, bottom)
            for row, (top, bottom) in along[0].items()
            for column, (left, right) in along[1].items()
        }

    def hidden(self, width: int, height: int) -> set[int]:
        """The patches without a pixel in such a drawing: they show padding, or less than a pixel of the image."""
        return set(range(self.count)) - set(np.unique(self.numbers(width, height)).tolist())

    def _extent(self) -> tuple[int, tuple[int, int]]:
        """Return M, by which the padded width is M / rows and its height M / columns, and the padding before the image.

        In whole pixels as the processor pads: of an odd one the smaller half comes first.
        """
        (width, height), (rows, columns) = self.size, self.grid
        most = max(width * rows, height * columns)
        return most, ((most - width * rows) // (2 * rows), (most - height * columns) // (2 * columns))

    def _places(self, drawn: int, axis: int) -> np.ndarray:
        """Return (drawn,) int64: row or column of patches of each pixel along an axis, 0 for the width."""
        most, before = self._extent()
        centre = (2 * np.arange(drawn, dtype=np.int64) + 1) * self.size[axis] + 2 * before[axis] * drawn
        return centre * (self.grid[0] * self.grid[1]) // (2 * drawn * most)

    def _spans(self, axis: int, drawn: int) -> dict[int, tuple[float, float]]:
        """Return row or column of patches -> its first and last edge in pixels of a drawing, if it shows anything."""
        most, before = self._extent()
        length, number = self.size[axis], self.grid[1 - axis]
        patch = most / (self.grid[0] * self.grid[1])
        found = {}
        for place in range(number):
            first, last = max(0.0, place * patch - before[axis]), min(float(length), (place + 1) * patch - before[axis])
            if last - first > 1e-9 * length:
                found[place] = (first * drawn / length, last * drawn / length)
        return found


def drawn_size(size: tuple[int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """Return width and height that an image is drawn in: small ones by a whole factor, large ones shrunk."""
    width, height = size
    if max(size) <= longest:
        factor = longest // max(size)
        return width * factor, height * factor
    return tuple(max(1, round(side * longest / max(size))) for side in size)  # type: ignore[return-value]


def drawn(image: Image.Image, longest: int = LONGEST_SIDE) -> np.ndarray:
    """Return an image's pixels (H, W, 3) uint8 at its `drawn_size`; the proportions stay."""
    size = drawn_size(image.size, longest)
    way = Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.LANCZOS
    return np.asarray(image.convert("RGB").resize(size, way))


def fade_dropped(
    pixels: np.ndarray, kept: Collection[int], grid: tuple[int, int], size: tuple[int, int] | None = None
) -> np.ndarray:
    """Fade the patches that are not in `kept`; (H, W, 3) uint8 of a whole image to the same.

    grid: rows and columns of patches; size: width and height of the image, where it is drawn at another size.
    """
    numbers = _numbers(pixels, grid, size)
    keep = np.zeros(grid[0] * grid[1], dtype=bool)
    keep[sorted(kept)] = True
    grey = pixels.mean(axis=2, keepdims=True)
    faded = np.rint(_FADE * _FADED_PAPER + (1 - _FADE) * grey).astype(np.uint8)
    return np.where(keep[numbers][..., None], pixels, faded)


def heat_map(
    pixels: np.ndarray, values: Sequence[float], grid: tuple[int, int], size: tuple[int, int] | None = None
) -> np.ndarray:
    """Paint each patch by its value between 0 and 1, over the image in grey; (H, W, 3) uint8 to the same."""
    numbers = _numbers(pixels, grid, size)
    colors = colormaps[HEAT](np.clip(np.asarray(values, dtype=float), 0, 1))[:, :3] * 255
    grey = pixels.mean(axis=2, keepdims=True)
    return np.rint(_HEAT_SHARE * colors[numbers] + (1 - _HEAT_SHARE) * grey).astype(np.uint8)


def patch_outline(
    patches: Collection[int], view: PatchView, width: int, height: int
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Border of a set of patches as line segments ((x0, y0), (x1, y1)) in pixels of a drawing of that size.

    A pixel's centre has whole numbers, as in matplotlib's pictures. Edges of the drawing are a border too.
    """
    columns, boxes = view.grid[1], view.boxes(width, height)
    inside = {divmod(patch, columns) for patch in patches if patch in boxes}
    edges = []
    for row, column in sorted(inside):
        left, top, right, bottom = (side - 0.5 for side in boxes[row * columns + column])
        neighbours = {
            (row - 1, column): ((left, top), (right, top)),
            (row + 1, column): ((left, bottom), (right, bottom)),
            (row, column - 1): ((left, top), (left, bottom)),
            (row, column + 1): ((right, top), (right, bottom)),
        }
        edges += [edge for place, edge in neighbours.items() if place not in inside]
    return edges


def _numbers(pixels: np.ndarray, grid: tuple[int, int], size: tuple[int, int] | None) -> np.ndarray:
    height, width = pixels.shape[:2]
    return PatchView(size or (width, height), grid).numbers(width, height)
