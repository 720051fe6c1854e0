"""Coarser square grids over the square grid of an image's patches, row by row: what pooling and downsampling share.

Budgets are squares: `eval compare --equal` names the nearest of any other.

Shape suffixes: n image tokens, m image tokens left, one for each cell.
"""

import math
from dataclasses import dataclass

from dynamic_llava.config import check_keep_rate
from dynamic_llava.methods.base import BudgetKind, Method
from dynamic_llava.sparsity import decisions


@dataclass(frozen=True)
class CoarserGrid(Method):
    """Each cell of a coarser grid becomes one token; output tokens all stay."""

    side_keep_rate: float = 0.5
    """Side of the coarser grid, in tokens, as a share of the grid's."""

    def __post_init__(self) -> None:
        check_keep_rate("side_keep_rate", self.side_keep_rate)

    def knobs(self, budget: BudgetKind) -> tuple[str, ...]:
        """The side."""
        return ("side_keep_rate",)


def sides(patches: int, side_keep_rate: float) -> tuple[int, int]:
    """Return the side of an image's grid, and floor(rate * side), at least 1: that of the coarser grid."""
    side = math.isqrt(patches)
    return side, decisions.budget(side_keep_rate, side)


def spans(side: int, coarse: int) -> list[tuple[int, int]]:
    """Return the first patch of each cell along one side, and the patch behind its last.

    Where `coarse` does not divide `side`, cells have the sizes of adaptive pooling and overlap by one patch.
    """
    return [(cell * side // coarse, -(-(cell + 1) * side // coarse)) for cell in range(coarse)]


def middles(side: int, coarse: int) -> list[int]:
    """Return m places among n: the patch in the middle of each cell, of an even number the one before the middle."""
    along = [(first + behind - 1) // 2 for first, behind in spans(side, coarse)]
    return [row * side + column for row in along for column in along]
