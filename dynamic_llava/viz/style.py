"""One look for every picture: colours, type sizes and a figure that needs no display."""

from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import ImageFont

INK = "#1f2933"
"""Text and axes; kept words."""
FADED = "#b8c0c9"
"""Dropped words."""
QUIET = "#66717d"
"""Captions and secondary text."""
GRID = "#e4e8ec"
"""Grid lines and rules."""
PAPER = "#ffffff"
"""Background."""
ACCENT = "#0b7285"
"""Image tokens; the learned method."""
SECOND = "#c2571a"
"""Output tokens."""
THIRD = "#5f3dc4"
"""A third series."""
OUTLINE = "#ffd43b"
"""Outlines of true objects on top of a picture."""
SERIES = (ACCENT, SECOND, THIRD, QUIET)


def new_figure(width: float, height: float) -> Figure:
    """A white figure of width x height inches with constrained layout, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def save(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Write the figure in the format of its ending, PNG or SVG (folders are made), and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "dynamic_llava"}):  # the same figure is the same file
        figure.savefig(path, dpi=dpi, facecolor=PAPER, **undated)
    return path


def tidy_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title to the left, no box, light horizontal grid."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9.5, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=9.5, color=QUIET)
    axes.tick_params(labelsize=9, colors=QUIET, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface of the figures for pictures that Pillow draws; `size` in pixels."""
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)
