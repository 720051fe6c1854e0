"""One look for every picture: colours that mean one thing each, type sizes for a slide, figures without a display.

matplotlib is imported by what draws with it: a page needs the colours alone.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
"""Text and axes; kept words."""
FADED = "#98a2ad"
"""Dropped words."""
QUIET = "#56616c"
"""Captions and secondary text."""
GRID = "#e4e8ec"
"""Grid lines and rules."""
PAPER = "#ffffff"
"""Background."""
OUTLINE = "#ffd43b"
"""Outlines of true objects on top of a picture."""

IMAGE_TOKENS = "#2f6fbb"
OUTPUT_TOKENS = "#b7791f"
PROMPT_TOKENS = "#7048a8"

DENSE = "#5c6770"
LEARNED = "#0b7285"
"""Dynamic-LLaVA, image and output tokens."""
LEARNED_IMAGE = "#4fb3bf"
"""Dynamic-LLaVA, image tokens alone."""
ATTENTION = "#c2410c"
"""Selection by attention: FastV."""
CHANCE = "#c2255c"
"""Random and other blind controls."""
OTHERS = ("#4d7c0f", "#364fc7", "#7a4a2b", "#a61e9d", "#0f766e", "#946c00")
"""Whatever has no colour of its own, in turn."""

MEANINGS = (
    ("random", CHANCE),
    ("chance", CHANCE),
    ("alternate", CHANCE),
    ("fastv", ATTENTION),
    ("attention", ATTENTION),
    ("i|t", LEARNED),
    ("both", LEARNED),
    ("image and output", LEARNED),
    ("dynamic i", LEARNED_IMAGE),
    ("dynamic-llava_i", LEARNED_IMAGE),
    ("image tokens dropped", LEARNED_IMAGE),
    ("dynamic", LEARNED),
    ("learned", LEARNED),
    ("dense", DENSE),
    ("llava-1.5", DENSE),
    ("control", DENSE),
    ("base", DENSE),
)
"""Words in a curve's name, in lower case, and what they mean; the first that occurs holds."""
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
MARKS = ("o", "s", "^", "D", "v", "P")

TITLE, LABEL, TICK, NOTE = 15, 13, 12, 12
"""Type sizes in points."""


class Look(NamedTuple):
    """How a curve or a point is drawn."""

    color: str
    dashes: object
    """A line style of matplotlib."""
    mark: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return how each name is drawn in one figure: by its meaning; of several with one meaning the lines differ."""
    found: dict[str, Look] = {}
    free, used = 0, dict.fromkeys((color for _, color in MEANINGS), 0) | dict.fromkeys(OTHERS, 0)
    for name in dict.fromkeys(names):
        color = next((color for word, color in MEANINGS if word in name.lower()), None)
        if color is None:
            color, free = OTHERS[free % len(OTHERS)], free + 1
        turn = used[color]
        used[color] += 1
        found[name] = Look(color, DASHES[turn % len(DASHES)], MARKS[turn % len(MARKS)])
    return found


def new_figure(width: float, height: float) -> "Figure":
    """A white figure of width x height inches with constrained layout, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def save(figure: "Figure", path: Path, dpi: int = 130, also: Sequence[str] = ()) -> Path:
    """Write the figure in the format of its ending, PNG, SVG or PDF (folders are made), and return the path.

    also: more endings, such as .svg, that it is written with beside it.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "dynamic_llava"}):  # the same figure is the same file
        for file in (path, *(path.with_suffix(ending) for ending in also)):
            figure.savefig(file, dpi=dpi, facecolor=PAPER, metadata=undated.get(file.suffix))
    return path


def tidy_axes(axes: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    """Title to the left, no box, light horizontal grid. The texts are shown as they are: a $ is a $."""
    axes.set_title(title, loc="left", fontsize=LABEL, color=INK, fontweight="bold", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=LABEL, color=QUIET, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=LABEL, color=QUIET, parse_math=False)
    axes.tick_params(labelsize=TICK, colors=QUIET, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface of the figures, to measure text with; `size` in pixels."""
    from matplotlib import font_manager

    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)
