"""How the key-value cache grows over an answer, sparse and dense."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamic_llava.viz import style


def draw_cache_growth(path: Path, lines: Mapping[str, Sequence[float]], *, title: str = "") -> Path:
    """Draw a PNG of bytes over output tokens, one curve per line; returns the path.

    Each line holds the bytes of the cache when its first, second, ... output token was chosen: the first value is the
    prompt's. The last value of every curve is written beside it. ValueError when there is no line or one is empty.
    """
    if not lines or not all(lines.values()):
        raise ValueError("no bytes were given; give at least one line with one value per output token")
    figure = style.new_figure(6.4, 3.7)
    axes = figure.subplots()
    style.tidy_axes(axes, title or "Key-value cache over an answer", "output tokens", "KiB")
    for (name, sizes), color in zip(lines.items(), style.SERIES * len(lines), strict=False):
        kibibytes = [size / 1024 for size in sizes]
        axes.plot(range(1, len(sizes) + 1), kibibytes, color=color, linewidth=1.8, label=name)
        end = len(sizes), kibibytes[-1]
        axes.annotate(
            f"{kibibytes[-1]:,.0f}", end, (4, 0), textcoords="offset points", va="center", fontsize=9, color=color
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.legend(frameon=False, fontsize=9, labelcolor=style.INK, loc="lower right")
    return style.save(figure, path)
