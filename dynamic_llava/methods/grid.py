"""Coarser square grids over the square grid of an image's patches, row by row: what pooling and downsampling share.

Shape suffixes: n image tokens, m image tokens left, one for each cell.
"""

import math

from dynamic_llava.sparsity.decisions import budget


def sides(patches: int, side_keep_rate: float) -> tuple[int, int]:
    """Return the side of an image's grid, and floor(rate * side), at least 1: that of the coarser grid."""
    side = math.isqrt(patches)
    return side, budget(side_keep_rate, side)


def spans(side: int, coarse: int) -> list[tuple[int, int]]:
    """Return the first patch of each cell along one side, and the patch behind its last.

    Where `coarse` does not divide `side`, cells have the sizes of adaptive pooling and overlap by one patch.
    """
    return [(cell * side // coarse, -(-(cell + 1) * side // coarse)) for cell in range(coarse)]


def middles(side: int, coarse: int) -> list[int]:
    """Return m places among n: the patch in the middle of each cell, of an even number the one before the middle."""
    along = [(first + behind - 1) // 2 for first, behind in spans(side, coarse)]
    return [row * side + column for row in along for column in along]
