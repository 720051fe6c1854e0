"""Kept patches over images: what the layers from the sparse one on still see of each picture."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from dynamic_llava.viz import style

_PANEL_PIXELS = 256
_FADE = 0.82


@dataclass(frozen=True)
class PatchChoice:
    """One row of the grid: a title and, per image, the numbers of the kept patches (row-major)."""

    title: str
    kept: Sequence[Collection[int]]


def draw_kept_patches(
    path: Path,
    images: Sequence[Image.Image],
    choices: Sequence[PatchChoice],
    grid: tuple[int, int],
    *,
    objects: Sequence[Sequence[Collection[int]]] | None = None,
    title: str = "",
) -> Path:
    """Draw a PNG with one column per image: the image itself, below it one row per choice with dropped patches faded.

    `images` are square; `grid` is (rows, columns) of patches. With `objects` (per image, per object, the numbers of its
    patches) true objects are outlined and each panel says how many are hit. Returns the path. ValueError when a choice
    does not hold one entry per image.
    """
    for choice in choices:
        if len(choice.kept) != len(images):
            raise ValueError(f"choice {choice.title!r} has {len(choice.kept)} entries for {len(images)} images")
    figure = style.new_figure(1.75 * len(images) + 0.6, 1.98 * (len(choices) + 1) + (0.55 if title else 0.2))
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(choices) + 1, len(images), squeeze=False)
    if title:
        figure.suptitle(title, fontsize=12.5, color=style.INK, fontweight="bold", x=0.012, ha="left")
    for i, image in enumerate(images):
        pixels = np.asarray(image.convert("RGB").resize((_PANEL_PIXELS, _PANEL_PIXELS), Image.Resampling.NEAREST))
        truth = objects[i] if objects is not None else ()
        caption = f"{len(truth)} object{'' if len(truth) == 1 else 's'}" if objects is not None else ""
        _panel(axes[0, i], pixels, truth, grid, caption)
        for axis, choice in zip(axes[1:, i], choices, strict=True):
            kept = set(choice.kept[i])
            _panel(axis, fade_dropped(pixels, kept, grid), truth, grid, _caption(kept, truth, grid))
    for axis, text in zip(axes[:, 0], ["image", *(choice.title for choice in choices)], strict=True):
        axis.set_ylabel(text, fontsize=10.5, color=style.INK, fontweight="bold", labelpad=6)
    return style.save(figure, path)


def fade_dropped(pixels: np.ndarray, kept: Collection[int], grid: tuple[int, int]) -> np.ndarray:
    """Fade the patches that are not in `kept` towards white; (H, W, 3) uint8 to the same, H and W multiples of grid."""
    rows, columns = grid
    keep = np.zeros(rows * columns, dtype=bool)
    keep[sorted(kept)] = True
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    mask = np.kron(keep.reshape(rows, columns), np.ones((height, width), dtype=bool)).astype(bool)
    grey = pixels.mean(axis=2, keepdims=True)
    faded = (_FADE * 255 + (1 - _FADE) * grey).repeat(3, axis=2)
    full = np.full_like(pixels, 255)
    full[: mask.shape[0], : mask.shape[1]] = np.where(
        mask[..., None], pixels[: mask.shape[0], : mask.shape[1]], faded[: mask.shape[0], : mask.shape[1]]
    )
    return full


def _caption(kept: set[int], truth: Sequence[Collection[int]], grid: tuple[int, int]) -> str:
    text = f"{len(kept)} of {grid[0] * grid[1]}"
    if not truth:
        return text
    return f"{text}, {sum(bool(kept & set(one)) for one in truth)}/{len(truth)} hit"


def _panel(
    axes: Axes, pixels: np.ndarray, truth: Sequence[Collection[int]], grid: tuple[int, int], caption: str
) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(style.FADED)
        spine.set_linewidth(0.8)
    axes.set_xlabel(caption, fontsize=8.5, color=style.QUIET, labelpad=3)
    edges = [edge for one in truth for edge in patch_outline(one, grid, pixels.shape[0] / grid[0])]
    for color, line_width in ((style.INK, 2.6), (style.OUTLINE, 1.3)):
        axes.add_collection(LineCollection(edges, colors=color, linewidths=line_width, capstyle="projecting"))


def patch_outline(
    patches: Collection[int], grid: tuple[int, int], side: float
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Border of a set of patches as line segments ((x0, y0), (x1, y1)) in pixels, for patches of `side` pixels."""
    columns = grid[1]
    inside = {divmod(patch, columns) for patch in patches}
    edges = []
    for row, column in sorted(inside):
        x, y = column * side - 0.5, row * side - 0.5
        neighbours = {
            (row - 1, column): ((x, y), (x + side, y)),
            (row + 1, column): ((x, y + side), (x + side, y + side)),
            (row, column - 1): ((x, y), (x, y + side)),
            (row, column + 1): ((x + side, y), (x + side, y + side)),
        }
        edges += [edge for place, edge in neighbours.items() if place not in inside]
    return edges
