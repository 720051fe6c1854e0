"""Curves: keep rates and loss over a training, accuracy over the image budget, and what a generation costs as it grows.

Keep rates are drawn against their targets; costs (Fig. 1) are the FLOPs of a step without cache and memory with cache.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dynamic_llava.viz import style

_KEEP_CURVES = (
    ("image_keep_rate", "image tokens", style.IMAGE_TOKENS),
    ("output_keep_rate", "output tokens", style.OUTPUT_TOKENS),
    ("prompt_keep_rate", "prompt tokens", style.PROMPT_TOKENS),
)

_PANELS = (
    ("flops", 1e-12, "One step without cache", "TFLOP, calculated"),
    ("memory", 2**-30, "Memory with cache", "GiB, calculated"),
)


def draw_training_curves(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    targets: Mapping[str, float],
    *,
    loss_key: str = "lm_loss",
    title: str = "",
) -> Path:
    """Draw a PNG with one panel of keep rates per sparse run and one panel of every run's loss.

    `runs` maps a run's title to its logged records, each a dict with "step" and any of image_keep_rate,
    output_keep_rate, prompt_keep_rate and `loss_key`; `targets` maps keep rates to their targets. Runs that log no keep
    rate appear in the loss panel only. Returns the path; ValueError without any record.
    """
    if not any(runs.values()):
        raise ValueError("no training records were given; give the lines of at least one metrics.jsonl")
    sparse = [name for name, log in runs.items() if any(_curve(log, key)[0] for key, _, _ in _KEEP_CURVES)]
    figure = style.new_figure(5.2 * (len(sparse) + 1), 4.2)
    axes = figure.subplots(1, len(sparse) + 1, squeeze=False)[0]
    for axis, name in zip(axes, sparse, strict=False):
        _draw_keep_rates(axis, runs[name], targets, f"keep rates, {name}")
    last = axes[-1]
    style.tidy_axes(last, "language-model loss", "step", "")
    for name, look in style.looks(runs).items():
        steps, values = _curve(runs[name], loss_key)
        if steps:
            last.plot(steps, values, color=look.color, linestyle=look.dashes, linewidth=1.8, label=name)
    last.set_ylim(bottom=0)
    last.legend(frameon=False, fontsize=style.NOTE, labelcolor=style.INK)
    if title:
        figure.suptitle(title, fontsize=style.TITLE, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path)


def draw_budget_curves(path: Path, lines: Mapping[str, Mapping[float, float]], trained_rate: float) -> Path:
    """Draw a PNG of accuracy (fractions) over the image keep rate, one curve per line; returns the path.

    `trained_rate` is marked: the keep rate that the learned selection was trained at. ValueError without any line.
    """
    if not lines:
        raise ValueError("no lines were given; give at least one mapping of keep rate to accuracy")
    figure = style.new_figure(8.0, 4.9)
    axes = figure.subplots()
    style.tidy_axes(
        axes, "Short answers over the image budget", "image tokens kept from the sparse layer on, %", "accuracy, %"
    )
    for name, look in style.looks(lines).items():
        rates = sorted(lines[name])
        values = [100 * lines[name][rate] for rate in rates]
        drawn = {"color": look.color, "linestyle": look.dashes, "marker": look.mark, "markersize": 5}
        axes.plot([100 * rate for rate in rates], values, linewidth=2, label=name, **drawn)
    axes.axvline(100 * trained_rate, color=style.GRID, linewidth=6, zorder=0, label="trained rate")
    axes.set_ylim(top=101)
    axes.legend(frameon=False, fontsize=style.NOTE, labelcolor=style.INK, loc="lower right")
    return style.save(figure, path)


def draw_cost_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], *, device_gib: float | None = None, title: str = ""
) -> Path:
    """Draw a PNG with two panels, one curve per method; returns the path.

    `rows` have method, outputs, flops and memory (bytes), as profile/tables.py calculates them; the axes say so.
    `device_gib` marks the memory of a device. ValueError without any row.
    """
    if not rows:
        raise ValueError("no rows were given; give those of the curve report")
    methods = style.looks(row["method"] for row in rows)
    figure = style.new_figure(11.0, 4.8)
    for axes, (key, scale, heading, unit) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        style.tidy_axes(axes, heading, "generated tokens", unit)
        for method, look in methods.items():
            points = sorted((row["outputs"], row[key] * scale) for row in rows if row["method"] == method)
            axes.plot(*zip(*points, strict=True), color=look.color, linestyle=look.dashes, linewidth=2, label=method)
        if key == "memory" and device_gib is not None:
            axes.axhline(device_gib, color=style.GRID, linewidth=4, zorder=0, label=f"the device: {device_gib:.1f} GiB")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=style.NOTE, labelcolor=style.INK)
    if title:
        figure.suptitle(title, fontsize=style.TITLE, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path)


def _draw_keep_rates(axes: Axes, log: Sequence[Mapping[str, Any]], targets: Mapping[str, float], title: str) -> None:
    style.tidy_axes(axes, title, "step", "kept, %")
    for key, label, color in _KEEP_CURVES:
        steps, values = _curve(log, key)
        if not steps:
            continue
        axes.plot(steps, [100 * value for value in values], color=color, linewidth=1.6, label=label)
        if key in targets:
            goal = f"target {100 * targets[key]:.0f} %"
            axes.axhline(100 * targets[key], color=color, linewidth=1, linestyle=(0, (4, 3)), label=goal)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=style.NOTE, labelcolor=style.INK, ncols=2, loc="upper right")


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the records that hold `key` as a number (NaN and missing values are left out)."""
    points = [(record["step"], record[key]) for record in log if isinstance(record.get(key), int | float)]
    points = [(step, value) for step, value in points if value == value]
    return [step for step, _ in points], [value for _, value in points]


def draw_quality_against_cost(path: Path, panels: Sequence[Mapping[str, Any]], *, title: str = "") -> tuple[Path, Path]:
    """Draw quality against cost, a PNG and an SVG of the same name, one panel for each benchmark and cost.

    A panel has title, cost and quality (what its axes say), lower_is_better, and points: name, cost, quality, interval
    (of the difference to the reference, or None), difference, front (whether it is on the Pareto front, which is
    drawn). The better is always higher. Returns both paths; ValueError without any panel.
    """
    if not panels:
        raise ValueError("no panels were given; give one for each benchmark and cost")
    columns = max(1, len({panel["title"] for panel in panels}))
    rows = -(-len(panels) // columns)
    figure = style.new_figure(5.0 * columns + 3.4, 4.2 * rows)
    looks = style.looks(point["name"] for panel in panels for point in panel["points"])
    shown: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        shown = _draw_panel(axes, panel, looks) | shown
    listed = [name for name in (*looks, _FRONT) if name in shown]
    handles = [shown[name] for name in listed]
    figure.legend(handles, listed, loc="outside right upper", frameon=False, fontsize=style.NOTE, labelcolor=style.INK)
    heading = title or "Quality against cost"
    figure.suptitle(heading, fontsize=style.TITLE, color=style.INK, fontweight="bold", x=0.01, ha="left")
    return style.save(figure, path, also=[".svg"]), path.with_suffix(".svg")


_FRONT = "Pareto front"


def _draw_panel(axes: Axes, panel: Mapping[str, Any], looks: Mapping[str, style.Look]) -> dict[str, Any]:
    """Draw one panel; return what the legend shows by name."""
    style.tidy_axes(axes, panel["title"], panel["cost"], panel["quality"])
    front = sorted((point["cost"], point["quality"]) for point in panel["points"] if point["front"])
    shown: dict[str, Any] = {}
    if front:
        line = axes.plot(*zip(*front, strict=True), color=style.FADED, linewidth=3, zorder=1, drawstyle="steps-post")
        shown[_FRONT] = line[0]
    for point in panel["points"]:
        look = looks[point["name"]]
        spread = None
        if point["interval"] is not None:
            low, high = point["interval"]
            spread = [[max(0.0, point["difference"] - low)], [max(0.0, high - point["difference"])]]
        shown[point["name"]] = axes.errorbar(
            point["cost"], point["quality"], yerr=spread, color=look.color, marker=look.mark, markersize=7,
            elinewidth=1, capsize=2, linestyle="none", zorder=2,
        )  # fmt: skip
    if panel["lower_is_better"]:
        axes.invert_yaxis()
    axes.margins(0.08)
    axes.locator_params(axis="x", nbins=5)
    return shown
