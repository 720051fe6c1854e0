"""Kept patches over images: what the layers from the sparse one on still see of each picture."""

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from PIL import Image

from dynamic_llava.viz import style
from dynamic_llava.viz.patches import HEAT, PatchView, drawn, fade_dropped, heat_map, patch_outline

_PANEL, _GAP, _LINE = 2.3, 0.16, 0.23
"""Inches: a panel's longest side, what is between panels, and a line of text."""
_BOLD: dict[str, Any] = {"color": style.INK, "fontweight": "bold", "parse_math": False}
_TITLE_LETTERS, _CAPTION_LETTERS = 19, 25
"""Letters in a line of a title and of a caption: what fits beside a panel."""


@dataclass(frozen=True)
class PatchChoice:
    """What is drawn of every image: a title and, per image, the numbers of the kept patches (row-major)."""

    title: str
    kept: Sequence[Collection[int]]
    heat: Sequence[Sequence[float]] | None = None
    """Instead of fading: per image, a value between 0 and 1 for each patch, painted on it."""
    captions: Sequence[str] | None = None
    """Per image; by default how many patches are kept, and how many objects are hit."""


def draw_kept_patches(
    path: Path,
    images: Sequence[Image.Image],
    choices: Sequence[PatchChoice],
    grid: tuple[int, int],
    *,
    objects: Sequence[Sequence[Collection[int]]] | None = None,
    title: str = "",
    beside: bool = False,
    also: Sequence[str] = (),
) -> Path:
    """Draw a PNG of each image and, below it, of each choice with the dropped patches faded.

    Images may have any size and proportion; `grid` is (rows, columns) of the patches of an image padded to a square,
    and padding is not drawn. With `objects` (per image, per object, the numbers of its patches) true objects are
    outlined and each panel says how many are hit. `beside`: choices to the right of their image instead. `also`: see
    `style.save`. Returns the path. ValueError when a choice does not hold one entry per image.
    """
    for choice in choices:
        if len(choice.kept) != len(images):
            raise ValueError(f"choice {choice.title!r} has {len(choice.kept)} entries for {len(images)} images")
    truths = objects if objects is not None else [()] * len(images)
    titles = [textwrap.fill(text, _TITLE_LETTERS) for text in ("image", *(choice.title for choice in choices))]
    captions = _captions(choices, truths, grid, counted=objects is not None)
    scaled = any(choice.heat is not None for choice in choices)
    sheet = _Sheet([image.size for image in images], titles, captions, beside=beside, title=title, scaled=scaled)
    for place, image in enumerate(images):
        pixels, view, truth = drawn(image), PatchView(image.size, grid), truths[place]
        _panel(sheet.axes(place, 0), pixels, truth, view)
        for number, choice in enumerate(choices, 1):
            if choice.heat is None:
                shown = fade_dropped(pixels, choice.kept[place], grid, image.size)
            else:
                shown = heat_map(pixels, choice.heat[place], grid, image.size)
            _panel(sheet.axes(place, number), shown, truth, view)
    return style.save(sheet.finish(), path, also=also)


class _Sheet:
    """Panels in rows and columns, each exactly in the proportions of its image; all lengths are inches."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        titles: Sequence[str],
        captions: Sequence[Sequence[str]],
        *,
        beside: bool,
        title: str,
        scaled: bool,
    ) -> None:
        self.beside, self.titles, self.captions = beside, titles, captions
        self.panels = [tuple(_PANEL * side / max(size) for side in size) for size in sizes]
        lines = [[text.count("\n") + 1 if text else 0 for text in row] for row in captions]
        below = [max(row) for row in (lines if beside else zip(*lines, strict=True))]
        tallest = [height for _, height in self.panels] if beside else [max(h for _, h in self.panels)] * len(titles)
        self.rows = [high + text * _LINE + _GAP for high, text in zip(tallest, below, strict=True)]
        self.tallest = tallest
        self.left = _GAP if beside else _GAP + max(text.count("\n") + 1 for text in titles) * _LINE
        columns = len(titles) if beside else len(sizes)
        self.width = self.left + columns * (_PANEL + _GAP) + (0.9 if scaled else 0)
        heading = textwrap.fill(title, int(8 * self.width))
        self.top = _GAP + ((heading.count("\n") + 2) * _LINE if title else 0)
        self.top += max(text.count("\n") + 1 for text in titles) * _LINE if beside else 0
        self.height = self.top + sum(self.rows)
        self.figure = style.new_figure(self.width, self.height)
        self.figure.set_layout_engine("none")
        if title:
            place = _GAP / self.width, 1 - _GAP / self.height
            self.figure.text(*place, heading, va="top", fontsize=style.TITLE, **_BOLD)
        self.scaled = scaled

    def axes(self, image: int, choice: int) -> Any:
        """Return new axes for an image and what is drawn of it, 0 for the image itself, with their texts."""
        row, column = (image, choice) if self.beside else (choice, image)
        width, height = self.panels[image]
        left = self.left + column * (_PANEL + _GAP) + (_PANEL - width) / 2
        bottom = self.height - self.top - sum(self.rows[:row]) - (self.tallest[row] + height) / 2
        box = left / self.width, bottom / self.height, width / self.width, height / self.height
        axes = self.figure.add_axes(box)
        if (self.beside and row == 0) or (not self.beside and column == 0):
            say = axes.set_title if self.beside else axes.set_ylabel
            say(self.titles[choice], fontsize=style.LABEL, **_BOLD)
        caption = self.captions[image][choice]
        axes.set_xlabel(caption, fontsize=style.NOTE - 1, color=style.QUIET, labelpad=3, parse_math=False)
        return axes

    def finish(self) -> Any:
        """Return the figure, with the scale of its heat maps at the right edge if it has any."""
        if not self.scaled:
            return self.figure
        high = min(2.0, 0.8 * self.height) / self.height
        bar = self.figure.add_axes(((self.width - 0.8) / self.width, 0.5 - high / 2, 0.13 / self.width, high))
        colors = self.figure.colorbar(ScalarMappable(cmap=HEAT), cax=bar)
        bar.tick_params(labelsize=style.TICK, colors=style.QUIET, length=0)
        colors.outline.set_visible(False)
        return self.figure


def _captions(
    choices: Sequence[PatchChoice],
    truths: Sequence[Sequence[Collection[int]]],
    grid: tuple[int, int],
    *,
    counted: bool,
) -> list[list[str]]:
    """Return what stands below the panels of each image, that of the image itself first."""
    found = []
    for place, truth in enumerate(truths):
        row = [f"{len(truth)} object{'' if len(truth) == 1 else 's'}" if counted else ""]
        for choice in choices:
            own = choice.captions
            text = _caption(set(choice.kept[place]), truth, grid) if own is None else own[place]
            row.append(textwrap.fill(text, _CAPTION_LETTERS))
        found.append(row)
    return found


def _caption(kept: set[int], truth: Sequence[Collection[int]], grid: tuple[int, int]) -> str:
    text = f"{len(kept)} of {grid[0] * grid[1]}"
    if not truth:
        return text
    return f"{text}, {sum(bool(kept & set(one)) for one in truth)}/{len(truth)} hit"


def _panel(axes: Any, pixels: np.ndarray, truth: Sequence[Collection[int]], view: PatchView) -> None:
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(style.FADED)
        spine.set_linewidth(0.8)
    height, width = pixels.shape[:2]
    edges = [edge for one in truth for edge in patch_outline(one, view, width, height)]
    for color, line_width in ((style.INK, 2.6), (style.OUTLINE, 1.3)):
        axes.add_collection(LineCollection(edges, colors=color, linewidths=line_width, capstyle="projecting"))
