"""How the key-value cache grows over an answer, sparse and dense."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamic_llava.viz import style

DENSE_CALCULATED = "dense, calculated"
"""Name of a line that was not run: every token stays in a dense cache. It is drawn dashed."""


def draw_cache_growth(
    path: Path,
    lines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    unit: str = "KiB",
    also: Sequence[str] = (),
) -> Path:
    """Draw a PNG of the cache over output tokens, one curve per line; returns the path.

    Each line holds the size of the cache when its first, second, ... output token was chosen: the first value is the
    prompt's. Bytes are drawn in the unit KiB; other units, such as tokens, as they are. The last value of every curve
    is written beside it. `also`: see `style.save`. ValueError when there is no line or one is empty.
    """
    if not lines or not all(lines.values()):
        raise ValueError("no bytes were given; give at least one line with one value per output token")
    figure = style.new_figure(9.6, 4.5)
    axes = figure.subplots()
    style.tidy_axes(axes, title or "Key-value cache over an answer", "generated tokens", unit)
    scale = 1 / 1024 if unit == "KiB" else 1
    for name, look in style.looks(lines).items():
        sizes = [size * scale for size in lines[name]]
        dashes = "dashed" if name == DENSE_CALCULATED else look.dashes
        label = textwrap.fill(name, 24)
        axes.plot(range(1, len(sizes) + 1), sizes, color=look.color, linewidth=2.2, linestyle=dashes, label=label)
        axes.annotate(
            f"{sizes[-1]:,.0f}", (len(sizes), sizes[-1]), (4, 0), textcoords="offset points", va="center",
            fontsize=style.NOTE, color=look.color,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    figure.legend(loc="outside right upper", frameon=False, fontsize=style.NOTE, labelcolor=style.INK)
    return style.save(figure, path, also=also)
