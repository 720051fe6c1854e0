"""What a generation costs as it grows (Fig. 1): FLOPs of a step without cache, memory with cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.viz import style

_PANELS = (
    ("flops", 1e-12, "One step without cache", "TFLOP"),
    ("memory", 2**-30, "Memory with cache", "GiB"),
)


def draw_cost_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], *, device_gib: float | None = None, title: str = ""
) -> Path:
    """Draw a PNG with two panels, one curve per method; returns the path.

    `rows` have method, outputs, flops and memory (bytes), as profile/tables.py gives them. `device_gib` marks the
    memory of a device. ValueError without any row.
    """
    if not rows:
        raise ValueError("no rows were given; give those of the curve report")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = style.new_figure(9.6, 3.9)
    for axes, (key, scale, heading, unit) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        style.tidy_axes(axes, heading, "generated tokens", unit)
        for method, color in zip(methods, (style.QUIET, style.SECOND, style.ACCENT, style.THIRD), strict=False):
            points = sorted((row["outputs"], row[key] * scale) for row in rows if row["method"] == method)
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, label=method)
        if key == "memory" and device_gib is not None:
            axes.axhline(device_gib, color=style.GRID, linewidth=4, zorder=0, label=f"the device: {device_gib:.1f} GiB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, labelcolor=style.INK)
    if title:
        figure.suptitle(title, fontsize=12, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path)
