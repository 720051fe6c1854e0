"""Images of any size as tiles: LLaVA-NeXT's way (AnyRes), counted in whole numbers.

A picture is resized to one tile, whatever its proportions; and once more, its proportions kept, into the best of some
resolutions, which is cut into tiles. The vision tower sees tile by tile. An image then is the tokens of the first tile,
and behind them, row by row, those of the others put together again, without the rows or columns that only held padding;
a learned newline token ends each row.
Liu et al., LLaVA-NeXT: Improved reasoning, OCR, and world knowledge, 2024; counted as transformers counts it
(models/llava_next of 5.17 to 5.24), which tests/projectors/test_tiles.py holds against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Size = Sequence[int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Tiling:
    """How images of any size are cut, and what they become."""

    side: int
    """Pixels a side of a tile, which is what the vision tower sees at once."""
    patch: int
    """Pixels a side of a patch."""
    resolutions: tuple[tuple[int, int], ...]
    """Heights and widths, whole numbers of tiles, that an image may be resized into."""

    @classmethod
    def of(cls, config: Any) -> "Tiling | None":
        """Return the tiling of a configuration (image_grid_pinpoints); None where images have one size."""
        chosen = getattr(config, "image_grid_pinpoints", None)
        if chosen is None:
            return None
        vision = config.vision_config
        return cls(vision.image_size, vision.patch_size, tuple((height, width) for height, width in chosen))

    @property
    def along(self) -> int:
        """Patches a side of a tile."""
        return self.side // self.patch

    @property
    def most_tiles(self) -> int:
        """The most tiles that an image becomes, the first one counted."""
        return 1 + max(height * width for height, width in self.resolutions) // self.side**2

    def best(self, size: Size) -> tuple[int, int]:
        """Return the resolution into which an image of this size goes: it keeps most pixels, and wastes fewest."""
        height, width = size

        def merit(resolution: tuple[int, int]) -> tuple[int, int]:
            rows, columns = resolution
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns

        return max(self.resolutions, key=merit)  # the first of equals

    def tiles(self, size: Size) -> int:
        """Return how many tiles an image becomes, the first one counted."""
        rows, columns = self.best(size)
        return 1 + rows // self.side * (columns // self.side)

    def grid(self, size: Size) -> tuple[int, int]:
        """Return rows and columns of the patches of all tiles but the first, without those that only hold padding."""
        height, width = size
        best_rows, best_columns = self.best(size)
        rows, columns = best_rows // self.side * self.along, best_columns // self.side * self.along
        if width / height > columns / rows:
            filled = int(round(height * (columns / width), 7))
            return rows - (rows - filled) // 2 * 2, columns
        filled = int(round(width * (rows / height), 7))
        return rows, columns - (columns - filled) // 2 * 2

    def newlines(self, size: Size) -> list[bool]:
        """Return for each token of an image whether it is a newline."""
        rows, columns = self.grid(size)
        return [False] * self.along**2 + ([False] * columns + [True]) * rows

    def tokens(self, size: Size) -> int:
        """Return how many tokens an image becomes, newlines counted."""
        rows, columns = self.grid(size)
        return self.along**2 + rows * (columns + 1)

    def image_tokens(self, size: Size) -> int:
        """Return how many tokens of an image a method decides on: newlines are not counted."""
        rows, columns = self.grid(size)
        return self.along**2 + rows * columns
